"""Maps between TrigFlow and flow matching, and a flow-matching network in TrigFlow form (arXiv 2511.20410, Eq. 5-7).

TrigFlow has x_t = cos(t) x_0 + sin(t) z with z ~ N(0, sigma_data^2 I) and t in radians; along the probability-flow ODE
dx_t/dt = sigma_data F(x_t / sigma_data, t). Flow matching has x_s = (1 - s) x_0 + s e and v = e - x_0 on unit-scale
data.
"""

import torch
from diffusers.utils import logging
from torch import nn

from .backbones import Backbone
from .flow import FlowTransformer, broadcast_time


logger = logging.get_logger(__name__)

SIGMA_DATA = 0.5  # standard deviation of TrigFlow's latents (arXiv 2410.11081)


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


def trig_to_flow_sample(sample: torch.Tensor, t: torch.Tensor, sigma_data: float = SIGMA_DATA) -> torch.Tensor:
    """Map TrigFlow samples to flow-matching samples (Eq. 6).

    Args:
        sample: x_t, (batch, channels, height, width), standard deviation `sigma_data`.
        t: angles in radians, (batch,).
        sigma_data: standard deviation of the TrigFlow latents.

    Returns:
        x_FM on unit scale, the shape of `sample`.
    """
    return sample / sigma_data * _flow_norm(broadcast_time(trig_to_flow_timestep(t), sample))


def flow_to_trig_sample(flow_sample: torch.Tensor, s: torch.Tensor, sigma_data: float = SIGMA_DATA) -> torch.Tensor:
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
    sample: torch.Tensor, trig_output: torch.Tensor, t: torch.Tensor, sigma_data: float = SIGMA_DATA
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


class TrigFlowTransformer(FlowTransformer):
    """A flow-matching transformer seen as the TrigFlow network F (Eq. 5-7), differentiable through the maps.

    Prompts may serve several consecutive rows each: what depends on the text only is then computed once per prompt.

    Args:
        transformer: the network in flow-matching form, of a family in `backbones`; it is held, not copied. Its
            cross-attention gets another processor, which computes the same.
        timestep_scale: what s in [0, 1] is multiplied by before the network sees it; by default what its config says.
        backbone: the transformer's family, for one of a class of your own; by default found by its class.
    """

    def __init__(
        self, transformer: nn.Module, timestep_scale: float | None = None, backbone: Backbone | None = None
    ) -> None:
        super().__init__(transformer, timestep_scale, backbone)
        if self.timestep_scale > 1 and not self.backbone.in_dense_time(transformer, self.timestep_scale):
            logger.warning(
                f"This transformer sees the time s in [0, 1] multiplied by timestep_scale={self.timestep_scale:g}, "
                "which multiplies dF/dt as well: the tangent explodes and training will be unstable. Fine-tune the "
                "teacher to dense time, s itself, first. The stock SanaSprintPipeline feeds s itself, so a student of "
                "this teacher will not draw there."
            )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Evaluate F(x_t / sigma_data, t) (Eq. 7).

        Args:
            sample: x_t / sigma_data, (batch, channels, height, width).
            timestep: t in radians, (batch,).
            encoder_hidden_states: prompt embeddings, (prompts, length, dim); batch is a multiple of prompts, and the
                first batch / prompts samples are of the first prompt.
            encoder_attention_mask: 1 for a token to attend to, 0 for padding, (prompts, length).
            guidance: unscaled classifier-free guidance weight, (batch,); only for a network with guidance embeddings.
            pooled_projections: one embedding a prompt, (prompts, dim), for networks that read one.

        Returns:
            F, the shape of `sample`, in float32 or, for a float64 sample, float64.

        Raises:
            ValueError: if `guidance` is missing for a network that takes it, or given to one that does not, or `batch`
                is no multiple of `prompts`.
        """
        # The maps amplify rounding near t = 0 and pi/2: they run wide whatever the network's dtype.
        wide = torch.promote_types(sample.dtype, torch.float32)
        sample, timestep = sample.to(wide), timestep.to(wide)
        s = trig_to_flow_timestep(timestep)
        flow_sample = trig_to_flow_sample(sample, timestep, sigma_data=1.0)
        text = (encoder_hidden_states, encoder_attention_mask)
        flow_output = super().forward(flow_sample, s, *text, guidance, pooled_projections)
        return flow_to_trig_output(flow_sample, flow_output, s)

    @property
    def time_dim(self) -> int:
        """Size of the conditioning vector."""
        one = torch.ones(1, device=self.transformer.device)
        return self.embed_timestep(one, one if self.guidance_embeds else None).shape[1]

    def rescale_guided(
        self, guided: torch.Tensor, conditional: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Rescale a guided F as the family's stock pipeline does its guided v, where it does.

        Args:
            guided: F_uncond + w (F_cond - F_uncond), (batch, channels, height, width).
            conditional: F_cond, the shape of `guided`.
            sample: x_t / sigma_data, the shape of `guided`.
            timestep: t in radians, (batch,).

        Returns:
            The guided F, the shape of `guided`.
        """
        if self.backbone.RESCALE_GUIDED is None:
            return guided
        s = trig_to_flow_timestep(timestep)
        flow_sample = trig_to_flow_sample(sample, timestep, sigma_data=1.0)
        guided, conditional = (trig_to_flow_output(flow_sample, output, s) for output in (guided, conditional))
        return flow_to_trig_output(flow_sample, super().rescale_guided(guided, conditional, flow_sample, s), s)

    def embed_timestep(self, timestep: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        """Embed time, and guidance where the network takes it, as the network does before its modulation layers.

        Args:
            timestep: t in radians, (batch,).
            guidance: unscaled classifier-free guidance weight, (batch,); only for a network with guidance embeddings.

        Returns:
            The conditioning vector, (batch, time_dim).

        Raises:
            ValueError: if `guidance` is missing for a network that takes it, or given to one that does not.
        """
        s = trig_to_flow_timestep(timestep.to(torch.promote_types(timestep.dtype, torch.float32)))
        return self.backbone.embed_time(self.transformer, s * self.timestep_scale, self._checked(guidance))
