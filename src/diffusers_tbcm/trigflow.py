"""Maps between TrigFlow and flow matching, and a flow-matching network in TrigFlow form (arXiv 2511.20410, Eq. 5-7).

TrigFlow has x_t = cos(t) x_0 + sin(t) z with z ~ N(0, sigma_data^2 I) and t in radians; along the probability-flow ODE
dx_t/dt = sigma_data F(x_t / sigma_data, t). Flow matching has x_s = (1 - s) x_0 + s e and v = e - x_0 on unit-scale
data.
"""

import copy

import torch
from diffusers.models import SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaCombinedTimestepGuidanceEmbeddings
from diffusers.utils import logging
from torch import nn

from .backbones.prompt_attention import deal_out, share_prompts


logger = logging.get_logger(__name__)

# diffusers' SanaPipeline feeds the network 1000 s times `config.timestep_scale`, and its SanaSprintPipeline feeds s
# itself whatever the config says. A checkpoint with this scale is therefore one whose network was trained on s.
DENSE_TIME_CONFIG_SCALE = 0.001
PLAIN_SANA_SCALE = 1000.0


SIGMA_DATA = 0.5


def broadcast_time(time: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Append axes to per-sample times so that they broadcast over the remaining axes of the samples.

    Args:
        time: times whose axes are the leading axes of `sample`, usually (batch,).
        sample: the samples, usually (batch, channels, height, width).

    Returns:
        The times with as many axes as `sample`.
    """
    return time.reshape(time.shape + (1,) * (sample.ndim - time.ndim))


def trig_to_flow_timestep(t: torch.Tensor) -> torch.Tensor:
    """Map TrigFlow angles to flow-matching times (Eq. 5).

    Args:
        t: angles in radians in [0, pi/2], any shape.

    Returns:
        s = sin t / (sin t + cos t) in [0, 1], the shape of `t`.
    """
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def flow_to_trig_timestep(s: torch.Tensor) -> torch.Tensor:
    """Map flow-matching times to TrigFlow angles (the inverse of Eq. 5).

    Args:
        s: times in [0, 1], any shape.

    Returns:
        t = atan2(s, 1 - s), radians in [0, pi/2], the shape of `s`.
    """
    return torch.atan2(s, 1 - s)


def _flow_norm(s: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(s**2 + (1 - s) ** 2)


def trig_to_flow_sample(sample: torch.Tensor, t: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """Map TrigFlow samples to flow-matching samples (Eq. 6).

    Args:
        sample: x_t, (batch, channels, height, width), standard deviation `sigma_data`.
        t: angles in radians, (batch,).
        sigma_data: standard deviation of the TrigFlow latents.

    Returns:
        x_FM on unit scale, the shape of `sample`.
    """
    return sample / sigma_data * _flow_norm(broadcast_time(trig_to_flow_timestep(t), sample))


def flow_to_trig_sample(flow_sample: torch.Tensor, s: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """Map flow-matching samples to TrigFlow samples (the inverse of Eq. 6).

    Args:
        flow_sample: x_FM on unit scale, (batch, channels, height, width).
        s: flow-matching times in [0, 1], (batch,).
        sigma_data: standard deviation of the TrigFlow latents.

    Returns:
        x_t with standard deviation `sigma_data`, the shape of `flow_sample`.
    """
    return sigma_data * flow_sample / _flow_norm(broadcast_time(s, flow_sample))


def flow_to_trig_output(flow_sample: torch.Tensor, flow_output: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Map a flow-matching velocity to the TrigFlow output (Eq. 7).

    Args:
        flow_sample: x_FM, the network's input, (batch, channels, height, width).
        flow_output: v(x_FM, s), the network's output, the shape of `flow_sample`.
        s: flow-matching times in [0, 1], (batch,).

    Returns:
        F(x_t / sigma_data, t), the shape of `flow_sample`.
    """
    s = broadcast_time(s, flow_sample)
    return ((1 - 2 * s) * flow_sample + (1 - 2 * s + 2 * s**2) * flow_output) / _flow_norm(s)


def trig_to_flow_output(flow_sample: torch.Tensor, trig_output: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Map a TrigFlow output to the flow-matching velocity (the inverse of Eq. 7).

    Args:
        flow_sample: x_FM, (batch, channels, height, width).
        trig_output: F(x_t / sigma_data, t), the shape of `flow_sample`.
        s: flow-matching times in [0, 1], (batch,).

    Returns:
        v(x_FM, s), the shape of `flow_sample`.
    """
    s = broadcast_time(s, flow_sample)
    return (_flow_norm(s) * trig_output - (1 - 2 * s) * flow_sample) / (1 - 2 * s + 2 * s**2)


def consistency_output(
    sample: torch.Tensor, trig_output: torch.Tensor, t: torch.Tensor, sigma_data: float = 0.5
) -> torch.Tensor:
    """Evaluate the consistency function f(x_t, t) = cos(t) x_t - sin(t) sigma_data F (Sec. 3.2).

    Args:
        sample: x_t, (batch, channels, height, width).
        trig_output: F(x_t / sigma_data, t), the shape of `sample`.
        t: angles in radians, (batch,).
        sigma_data: standard deviation of the TrigFlow latents.

    Returns:
        The predicted clean latent, the shape of `sample`.
    """
    t = broadcast_time(t, sample)
    return torch.cos(t) * sample - torch.sin(t) * sigma_data * trig_output


@torch.no_grad()
def infer_timestep_scale(
    transformer: SanaTransformer2DModel,
    prompt_embeds: torch.Tensor,
    prompt_attention_mask: torch.Tensor | None = None,
) -> float:
    """Find out what a network's time input is in units of s: its config alone does not tell 1 from 1000.

    A config with `timestep_scale=1.0` is a dense-time network (fed s) in a Sana-Sprint pipeline and a plain Sana (fed
    1000 s) in a SanaPipeline. So both are tried on pure noise e, where v = e - E[x_0] is close to e: told another
    time than that of pure noise, a network takes the noise for signal and misses it.

    Args:
        transformer: the network in flow-matching form.
        prompt_embeds: embedding of any prompt, the empty one for example, (1, length, dim).
        prompt_attention_mask: its mask, (1, length).

    Returns:
        The factor on s for `TrigFlowTransformer`: 1 for dense time, 1000 for a plain Sana.
    """
    config = transformer.config
    if config["guidance_embeds"] or config["timestep_scale"] != 1:
        return 1.0 if config["timestep_scale"] == DENSE_TIME_CONFIG_SCALE else config["timestep_scale"]
    size = config["sample_size"]
    noise = torch.randn((1, config["in_channels"], size, size), generator=torch.Generator().manual_seed(0))
    noise = noise.to(transformer.device, transformer.dtype)

    def error(time: float) -> float:
        velocity = transformer(
            noise,
            encoder_hidden_states=prompt_embeds.to(transformer.dtype),
            timestep=torch.full((1,), time, device=transformer.device),
            encoder_attention_mask=prompt_attention_mask,
            return_dict=False,
        )[0]
        return (velocity - noise).float().square().mean().item()

    # By a clear margin: a network that was not trained tells nothing, and counts as dense.
    return PLAIN_SANA_SCALE if error(PLAIN_SANA_SCALE) < 0.5 * error(1.0) else 1.0


class TrigFlowTransformer(nn.Module):
    """A flow-matching Sana transformer seen as the TrigFlow network F (Eq. 5-7), differentiable through the maps.

    Prompts may serve several consecutive rows each: what depends on the text only is then computed once per prompt.

    Args:
        transformer: the network in flow-matching form; it is held, not copied. Its cross-attention gets another
            processor, which computes the same.
        timestep_scale: what s in [0, 1] is multiplied by before the network sees it. None takes
            `transformer.config.timestep_scale`, or 1.0 where that is 0.001, the mark of a network trained on s itself.
    """

    def __init__(self, transformer: SanaTransformer2DModel, timestep_scale: float | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        share_prompts(transformer)
        if timestep_scale is None:
            config_scale = transformer.config["timestep_scale"]
            timestep_scale = 1.0 if config_scale == DENSE_TIME_CONFIG_SCALE else config_scale
        self.timestep_scale = timestep_scale
        if timestep_scale > 1:
            logger.warning(
                f"This transformer sees the time s in [0, 1] multiplied by timestep_scale={timestep_scale:g}, "
                "which multiplies dF/dt as well: the tangent explodes and training will be unstable. Fine-tune the "
                "teacher to dense time, s itself, first. The stock SanaSprintPipeline feeds s itself, so a student of "
                "this teacher will not draw there."
            )

    @property
    def guidance_embeds(self) -> bool:
        """Whether the network takes the guidance scale as an input."""
        return self.transformer.config["guidance_embeds"]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Evaluate F(x_t / sigma_data, t) (Eq. 7).

        Args:
            sample: x_t / sigma_data, (batch, channels, height, width).
            timestep: t in radians, (batch,).
            encoder_hidden_states: prompt embeddings, (prompts, length, dim); batch is a multiple of prompts, and the
                first batch / prompts samples are of the first prompt.
            encoder_attention_mask: 1 for a token to attend to, 0 for padding, (prompts, length).
            guidance: unscaled classifier-free guidance weight, (batch,); only for a network with guidance embeddings.

        Returns:
            F, the shape of `sample`, in float32 or, for a float64 sample, float64.

        Raises:
            ValueError: if `guidance` is missing for a network that takes it, or given to one that does not, or `batch`
                is no multiple of `prompts`.
        """
        # The maps amplify rounding near t = 0 and pi/2: they run wide whatever the network's dtype.
        wide = torch.promote_types(sample.dtype, torch.float32)
        sample, timestep = sample.to(wide), timestep.to(wide)
        network_dtype = self.transformer.dtype
        if encoder_attention_mask is None:
            encoder_attention_mask = encoder_hidden_states.new_ones(encoder_hidden_states.shape[:2])
        text, mask = deal_out(encoder_hidden_states.to(network_dtype), encoder_attention_mask, sample.shape[0])
        s = trig_to_flow_timestep(timestep)
        flow_sample = trig_to_flow_sample(sample, timestep, sigma_data=1.0)
        flow_output = self.transformer(
            flow_sample.to(network_dtype),
            encoder_hidden_states=text,
            timestep=s * self.timestep_scale,
            guidance=self._network_guidance(guidance),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return flow_to_trig_output(flow_sample, flow_output.to(wide), s)

    def embed_timestep(self, timestep: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        """Embed time, and guidance where the network takes it, as the network does before its modulation layers.

        Args:
            timestep: t in radians, (batch,).
            guidance: unscaled classifier-free guidance weight, (batch,); only for a network with guidance embeddings.

        Returns:
            The conditioning vector, (batch, inner_dim).

        Raises:
            ValueError: if `guidance` is missing for a network that takes it, or given to one that does not.
        """
        s = trig_to_flow_timestep(timestep.to(torch.promote_types(timestep.dtype, torch.float32)))
        network_guidance = self._network_guidance(guidance)
        condition = {} if network_guidance is None else {"guidance": network_guidance}
        _, embedded = self.transformer.time_embed(
            s * self.timestep_scale, hidden_dtype=self.transformer.dtype, **condition
        )
        return embedded

    def _network_guidance(self, guidance: torch.Tensor | None) -> torch.Tensor | None:
        if self.guidance_embeds and guidance is None:
            raise ValueError("`guidance` is None, but the transformer embeds guidance and needs a weight per sample.")
        if guidance is None:
            return None
        if not self.guidance_embeds:
            raise ValueError(f"`guidance` is {guidance}, but the transformer does not embed guidance.")
        return guidance * self.transformer.config["guidance_embeds_scale"]


class WideTimeEmbedding(SanaCombinedTimestepGuidanceEmbeddings):
    """diffusers' time and guidance embedding, in float32 under autocast too: its tangent spikes in bf16."""

    def forward(
        self, timestep: torch.Tensor, guidance: torch.Tensor, hidden_dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed times and guidance; `hidden_dtype`, the activations', is followed by half-precision weights only."""
        dtype = self.timestep_embedder.linear_1.weight.dtype
        if dtype in (torch.float16, torch.bfloat16):
            return super().forward(timestep, guidance, hidden_dtype)
        with torch.autocast(timestep.device.type, enabled=False):
            return super().forward(timestep, guidance, dtype)


def make_student(
    teacher: SanaTransformer2DModel, guidance_embeds_scale: float | None = None
) -> SanaTransformer2DModel:
    """Copy a teacher into a trainable student that takes the guidance scale as an input and starts equal to it.

    A teacher without a guidance embedder gets one whose last layer is zero, so the copy computes the same function for
    every guidance. The weights `time_embed.emb.timestep_embedder.*` are `time_embed.timestep_embedder.*` in the copy.

    Args:
        teacher: the network to copy; it is left as it is.
        guidance_embeds_scale: what the student multiplies guidance by; None keeps the teacher's.

    Returns:
        The student, on the teacher's device and in its dtype, every parameter trainable.

    Raises:
        ValueError: if the teacher already embeds guidance with another scale than `guidance_embeds_scale`.
    """
    scale = teacher.config["guidance_embeds_scale"] if guidance_embeds_scale is None else guidance_embeds_scale
    if teacher.config["guidance_embeds"] and scale != teacher.config["guidance_embeds_scale"]:
        raise ValueError(
            f"`guidance_embeds_scale` is {scale}, but the teacher embeds guidance with scale "
            f"{teacher.config['guidance_embeds_scale']}."
        )
    student = copy.deepcopy(teacher)
    embed_guidance(student, scale)
    return student.requires_grad_(True)


def embed_guidance(transformer: SanaTransformer2DModel, guidance_embeds_scale: float) -> None:
    """Let a transformer take the guidance scale as an input, in place and without changing what it computes.

    Its embedders and modulation layer are kept, the first renamed from `time_embed.emb.timestep_embedder` to
    `time_embed.timestep_embedder`; a new `time_embed.guidance_embedder` has a last layer of zeros.

    Args:
        transformer: a network with or without a guidance embedder.
        guidance_embeds_scale: what it is to multiply guidance by.
    """
    inner_dim = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    old, time_embed = transformer.time_embed, WideTimeEmbedding(inner_dim)
    if transformer.config["guidance_embeds"]:
        time_embed.timestep_embedder, time_embed.guidance_embedder = old.timestep_embedder, old.guidance_embedder
    else:
        nn.init.zeros_(time_embed.guidance_embedder.linear_2.weight)
        nn.init.zeros_(time_embed.guidance_embedder.linear_2.bias)
        time_embed.to(device=transformer.device, dtype=transformer.dtype)
        time_embed.timestep_embedder = old.emb.timestep_embedder
    time_embed.linear = old.linear
    transformer.time_embed = time_embed
    transformer.register_to_config(guidance_embeds=True, guidance_embeds_scale=guidance_embeds_scale)
