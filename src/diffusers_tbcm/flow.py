"""Rectified flow: x_s = (1 - s) x_0 + s e and v = e - x_0, s = 1 for noise; and a network seen as this v."""

from typing import Any

import torch
from torch import nn

from .backbones import Backbone, backbone_of
from .text import Text


def broadcast_time(time: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Append axes to per-sample times so that they broadcast over the remaining axes of the samples.

    Args:
        time: times whose axes are the leading axes of `sample`, usually (batch,).
        sample: the samples, usually (batch, channels, height, width).

    Returns:
        The times with as many axes as `sample`.
    """
    return time.reshape(time.shape + (1,) * (sample.ndim - time.ndim))


def add_flow_noise(original_sample: torch.Tensor, noise: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Noise clean latents: x_s = (1 - s) x_0 + s e.

    Args:
        original_sample: x_0, (batch, ...).
        noise: e, the shape of `original_sample`.
        s: times in [0, 1], (batch,).

    Returns:
        x_s, the shape of `original_sample`.
    """
    s = broadcast_time(s, original_sample)
    return (1 - s) * original_sample + s * noise


def flow_prediction(sample: torch.Tensor, velocity: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Read the clean latent out of a velocity: D(x_s, s) = x_s - s v.

    Args:
        sample: x_s, (batch, ...).
        velocity: v(x_s, s), the shape of `sample`.
        s: times in [0, 1], (batch,).

    Returns:
        D, the shape of `sample`.
    """
    return sample - broadcast_time(s, sample) * velocity


def flow_step(sample: torch.Tensor, velocity: torch.Tensor, s: torch.Tensor, next_s: torch.Tensor) -> torch.Tensor:
    """Take an Euler step: x_{s'} = x_s + (s' - s) v.

    Args:
        sample: x_s, (batch, ...).
        velocity: v(x_s, s), the shape of `sample`.
        s: times in [0, 1], (batch,).
        next_s: where to go, either way, (batch,).

    Returns:
        x_{s'}, the shape of `sample`.
    """
    return sample + broadcast_time(next_s - s, sample) * velocity


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Shift times towards noise: k s / (1 + (k - 1) s), as diffusers' FlowMatchEulerDiscreteScheduler does.

    Args:
        sigmas: times in [0, 1], any shape.
        shift: k; 1 leaves them.

    Returns:
        The times, the shape of `sigmas`.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class FlowTransformer(nn.Module):
    """A flow-matching transformer seen as the velocity v(x_s, s), in float32 or wider.

    Prompts may serve several consecutive rows each: what depends on the text only is then computed once per prompt.

    Args:
        transformer: the network, of a family in `backbones`; it is held, not copied. Sana's cross-attention gets
            another processor, which computes the same.
        timestep_scale: what s in [0, 1] is multiplied by before the network sees it; by default what its config says.
        backbone: the transformer's family, for one of a class of your own; by default found by its class.
    """

    transformer: Any  # of a family's class, which diffusers leaves to run time

    def __init__(
        self, transformer: nn.Module, timestep_scale: float | None = None, backbone: Backbone | None = None
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self._backbone = backbone
        self.backbone.make_ready(transformer)
        self.timestep_scale = self.backbone.timestep_scale(transformer) if timestep_scale is None else timestep_scale

    @property
    def backbone(self) -> Backbone:
        """The transformer's family."""
        return self._backbone or backbone_of(self.transformer)

    @property
    def guidance_embeds(self) -> bool:
        """Whether the network takes the guidance scale as an input."""
        return self.backbone.embeds_guidance(self.transformer)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Evaluate v(x_s, s).

        Args:
            sample: x_s on unit scale, (batch, channels, height, width).
            timestep: s in [0, 1], (batch,).
            encoder_hidden_states: prompt embeddings, (prompts, length, dim); batch is a multiple of prompts, and the
                first batch / prompts samples are of the first prompt.
            encoder_attention_mask: 1 for a token to attend to, 0 for padding, (prompts, length).
            guidance: unscaled classifier-free guidance weight, (batch,); only for a network with guidance embeddings.
                None is 1, which students that learn one guidance are told.
            pooled_projections: one embedding a prompt, (prompts, dim), for networks that read one.

        Returns:
            v, the shape of `sample`, in float32 or, for a float64 sample, float64.

        Raises:
            ValueError: if `guidance` is missing for a network whose students take it, or given to one that takes none,
                or `batch` is no multiple of `prompts`.
        """
        wide = torch.promote_types(sample.dtype, torch.float32)
        sample, timestep = sample.to(wide), timestep.to(wide)
        if encoder_attention_mask is None:
            encoder_attention_mask = encoder_hidden_states.new_ones(encoder_hidden_states.shape[:2])
        text = Text(encoder_hidden_states, encoder_attention_mask, pooled_projections)
        return self.backbone.velocity(
            self.transformer, sample, timestep * self.timestep_scale, text, self._checked(guidance)
        ).to(wide)

    def rescale_guided(
        self, guided: torch.Tensor, conditional: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Rescale a guided v as the family's stock pipeline does, where it does.

        Args:
            guided: v_uncond + w (v_cond - v_uncond), (batch, channels, height, width).
            conditional: v_cond, the shape of `guided`.
            sample: x_s, the shape of `guided`.
            timestep: s, (batch,).

        Returns:
            The guided v, the shape of `guided`.
        """
        rescale = self.backbone.RESCALE_GUIDED
        return guided if rescale is None else rescale(guided, conditional)

    def _checked(self, guidance: torch.Tensor | None) -> torch.Tensor | None:
        if self.guidance_embeds and guidance is None and self.backbone.STUDENT_EMBEDS_GUIDANCE:
            raise ValueError("`guidance` is None, but the transformer embeds guidance and needs a weight per sample.")
        if guidance is not None and not self.guidance_embeds:
            raise ValueError(f"`guidance` is {guidance}, but the transformer does not embed guidance.")
        return guidance
