"""The adaptively weighted consistency loss and the head that learns its weight (Alg. 1 of arXiv 2511.20410)."""

import torch
from torch import nn

from .dual import Dual
from .trigflow import SIGMA_DATA, TrigFlowTransformer, consistency_output


class LogvarHead(nn.Module):
    """The learned log-variance of the loss at a time and guidance; it belongs to training only. It starts at zero.

    Args:
        inner_dim: size of the student's conditioning vector.
    """

    def __init__(self, inner_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inner_dim, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embedded_timestep: torch.Tensor) -> torch.Tensor:
        """Evaluate the log-variance.

        Args:
            embedded_timestep: the student's conditioning vector, (batch, inner_dim).

        Returns:
            The log-variance, (batch,), in the head's dtype.
        """
        # The loss exponentiates it: it is not left to autocast's rounding.
        with torch.autocast(embedded_timestep.device.type, enabled=False):
            return self.linear(embedded_timestep.to(self.linear.weight.dtype)).squeeze(-1)


class StudentWithLogvar(nn.Module):
    """The student and its logvar head in one module, so that one distributed forward uses every trained parameter.

    Args:
        student: the network F.
        logvar_head: the head.
    """

    def __init__(self, student: TrigFlowTransformer, logvar_head: LogvarHead) -> None:
        super().__init__()
        self.student = student
        self.logvar_head = logvar_head

    def forward(
        self,
        sample: torch.Tensor | Dual,
        timestep: torch.Tensor | Dual,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | Dual, torch.Tensor]:
        """Evaluate F and the log-variance; the arguments are those of `TrigFlowTransformer.forward`.

        Args:
            sample: x_t / sigma_data, (batch, channels, height, width), dual where F is to be.
            timestep: t in radians, (batch,), dual where F is to be.
            encoder_hidden_states: prompt embeddings, (prompts, length, dim).
            encoder_attention_mask: 1 for a token, 0 for padding, (prompts, length).
            guidance: unscaled classifier-free guidance weight, (batch,).

        Returns:
            F, the shape of `sample`, and the log-variance, (batch,).
        """
        trig_output = self.student(sample, timestep, encoder_hidden_states, encoder_attention_mask, guidance)
        # Detached: until the head has converged, its gradient is larger than the tangent's by about the number of
        # latent elements, and would move the student's time embedding instead of the head.
        t = timestep.primal if isinstance(timestep, Dual) else timestep
        return trig_output, self.logvar_head(self.student.embed_timestep(t, guidance).detach())


def consistency_weight(t: torch.Tensor, sigma_data: float = SIGMA_DATA) -> torch.Tensor:
    """Evaluate the prior weight of a time in the loss, w(t) = 1 / (sigma_data tan t).

    Args:
        t: angles in radians in (0, pi/2), any shape.
        sigma_data: standard deviation of the latents.

    Returns:
        The weight, the shape of `t`.
    """
    return 1 / (sigma_data * torch.tan(t))


def consistency_error(trig_output: torch.Tensor, trig_output_sg: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """Evaluate the unweighted squared error of every sample, mean (F - F_sg - g)^2 (Alg. 1).

    Args:
        trig_output: F with gradient, (batch, channels, height, width).
        trig_output_sg: F without gradient, the shape of `trig_output`.
        tangent: normalised g, the shape of `trig_output`.

    Returns:
        The error, (batch,), in float32 or wider.
    """
    wide = torch.promote_types(trig_output.dtype, torch.float32)
    return (trig_output.to(wide) - trig_output_sg.to(wide) - tangent.to(wide)).square().flatten(1).mean(1)


def consistency_loss(
    trig_output: torch.Tensor,
    trig_output_sg: torch.Tensor,
    tangent: torch.Tensor,
    logvar: torch.Tensor,
    timesteps: torch.Tensor,
    sigma_data: float = SIGMA_DATA,
) -> torch.Tensor:
    """Evaluate the loss mean(w(t) / exp(logvar) (F - F_sg - g)^2 + logvar) (Alg. 1).

    Its value says little, as F equals F_sg; its gradient with respect to F is -2 w / exp(logvar) g over the number of
    elements.

    Args:
        trig_output: F with gradient, (batch, channels, height, width).
        trig_output_sg: F without gradient, the shape of `trig_output`.
        tangent: normalised g, the shape of `trig_output`.
        logvar: log-variance of every sample, (batch,).
        timesteps: t in radians in (0, pi/2), (batch,).
        sigma_data: standard deviation of the latents.

    Returns:
        The loss, a scalar in float32 or wider.
    """
    error = consistency_error(trig_output, trig_output_sg, tangent)
    logvar = logvar.to(error.dtype)
    weight = consistency_weight(timesteps.to(error.dtype), sigma_data)
    return (weight / torch.exp(logvar) * error + logvar).mean()


def endpoint_loss(
    trig_output: torch.Tensor,
    latents: torch.Tensor,
    pred_original_sample: torch.Tensor,
    timesteps: torch.Tensor,
    sigma_data: float = SIGMA_DATA,
) -> torch.Tensor:
    """Evaluate mean ||f(x_t, t) - x_0||^2 / sigma_data^2: every point of a trajectory is to lead to its end at once.

    It has the same solution as the consistency loss, the map from a point to the end of its ODE trajectory, and is
    learnt faster at first, but blurs where it has not been learnt: a warm-up, known as ODE initialisation, and no part
    of the paper.

    Args:
        trig_output: F with gradient, (batch, channels, height, width).
        latents: x_t, the shape of `trig_output`.
        pred_original_sample: x_0 at the end of the trajectory, the shape of `trig_output`.
        timesteps: t in radians, (batch,).
        sigma_data: standard deviation of the latents.

    Returns:
        The loss, a scalar in float32 or wider.
    """
    wide = torch.promote_types(trig_output.dtype, torch.float32)
    prediction = consistency_output(latents.to(wide), trig_output.to(wide), timesteps, sigma_data)
    return ((prediction - pred_original_sample.to(wide)) / sigma_data).square().mean()
