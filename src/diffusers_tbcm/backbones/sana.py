"""stub"""

from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

from ..pipeline_folder import latent_size, vae_scale_factor
from ..pipeline_sana_tbcm import COMPLEX_HUMAN_INSTRUCTION, SanaTBCMPipeline
from ..trigflow import infer_timestep_scale, make_student
from ..versions import dtype_argument


class Sana:
    instruction = COMPLEX_HUMAN_INSTRUCTION

    def load_transformer(self, folder):
        return SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer").float()

    def load_vae(self, folder):
        return AutoencoderDC.from_pretrained(folder, subfolder="vae")

    def load_text_pipeline(self, folder, dtype):
        text = SanaPipeline.from_pretrained(folder, vae=None, transformer=None, **dtype_argument(dtype))
        text.text_encoder.requires_grad_(False)
        return text

    def latent_shape(self, folder, transformer, resolution):
        size = latent_size(folder, transformer, resolution)
        return (transformer.config.in_channels, size, size)

    def vae_scale_factor(self, folder):
        return vae_scale_factor(folder)

    def infer_timestep_scale(self, transformer, text):
        return infer_timestep_scale(transformer, text.embeds, text.mask)

    def blocks(self, transformer):
        return list(transformer.transformer_blocks)

    def inner_dim(self, transformer):
        return transformer.config.num_attention_heads * transformer.config.attention_head_dim

    def make_student(self, transformer):
        return make_student(transformer)

    def student_pipeline(self, folder, transformer, scheduler):
        pipeline = SanaTBCMPipeline(None, None, self.load_vae(folder).to(transformer.device), transformer, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
