"""Write a full-size Sana pipeline folder with random weights, to try the training script's memory and speed on.

    python -m benchmarks.random_teacher --model 0.6b --output_dir runs/random-0.6b
    accelerate launch examples/tbcm/train_tbcm_distill.py --dry_run --pretrained_model_name_or_path runs/random-0.6b \
        --prompts_file examples/tbcm/sana_emoji_mini/prompts.txt --output_dir runs/dry --route_steps 17 \
        --mixed_precision bf16 --gradient_checkpointing --brightness_threshold 0

Transformer and autoencoder have the published sizes. The text encoder is one layer of the right width, with the
embedded teacher's tokenizer: the script's own work is what is measured.
"""

import argparse

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

from .common import CONFIGS, EMBEDDED_TEACHER, random_transformer


def random_pipeline(model: str, resolution: int, **text_config: int) -> SanaPipeline:
    """A Sana of a published size with random weights.

    Args:
        model: "0.6b" or "1.6b".
        resolution: in pixels.
        text_config: of the text encoder, which has one layer by default.
    """
    transformer = random_transformer(model, resolution)
    width = transformer.config.caption_channels
    tokenizer = GemmaTokenizerFast.from_pretrained(EMBEDDED_TEACHER / "tokenizer")
    sizes = {"intermediate_size": width, "num_hidden_layers": 1, **text_config}
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=width, num_attention_heads=8, num_key_value_heads=4, **sizes
        )
    )
    return SanaPipeline(
        tokenizer, text_encoder, AutoencoderDC(), transformer, FlowMatchEulerDiscreteScheduler(shift=2.5)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="0.6b")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    pipeline = random_pipeline(args.model, args.resolution)
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    pipeline.to(torch.bfloat16).save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {parameters / 1e9:.2f} B parameters, random")


if __name__ == "__main__":
    main()
