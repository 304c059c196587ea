"""The weighted consistency loss and the head that may learn its weight (Alg. 1 of arXiv 2511.20410)."""

import torch
from torch import nn

from .dual import Dual
from .trigflow import SIGMA_DATA, TrigFlowTransformer, consistency_output


LOSS_WEIGHTINGS = ("learned", "prior", "uniform")  # of `loss_weight`; the first is the paper's
ENDPOINT_LOSS_TYPES = ("norm", "l2")  # of `endpoint_loss`
NORM_CONSTANT = 0.01  # root-mean-square error below which `norm` is quadratic, on unit scale: no kink at 0


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
        logvar_head: the head; None for a loss whose weight is not learnt.
    """

    def __init__(self, student: TrigFlowTransformer, logvar_head: LogvarHead | None) -> None:
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
        pooled_projections: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | Dual, torch.Tensor]:
        """Evaluate F and the log-variance; the arguments are those of `TrigFlowTransformer.forward`.

        Args:
            sample: x_t / sigma_data, (batch, channels, height, width), dual where F is to be.
            timestep: t in radians, (batch,), dual where F is to be.
            encoder_hidden_states: prompt embeddings, (prompts, length, dim).
            encoder_attention_mask: 1 for a token, 0 for padding, (prompts, length).
            guidance: unscaled classifier-free guidance weight, (batch,), for a network that embeds it.
            pooled_projections: one embedding a prompt, (prompts, dim), for networks that read one.

        Returns:
            F, the shape of `sample`, and the log-variance, (batch,), 0 without a head.
        """
        text = (encoder_hidden_states, encoder_attention_mask)
        trig_output = self.student(sample, timestep, *text, guidance, pooled_projections)
        # Detached: until the head has converged, its gradient is larger than the tangent's by about the number of
        # latent elements, and would move the student's time embedding instead of the head.
        t = timestep.primal if isinstance(timestep, Dual) else timestep
        if self.logvar_head is None:
            return trig_output, torch.zeros_like(t)
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


def loss_weight(
    t: torch.Tensor, logvar: torch.Tensor, weighting: str = "learned", sigma_data: float = SIGMA_DATA
) -> torch.Tensor:
    """Evaluate what a row's error is multiplied by in the loss.

    `learned` is w(t) / exp(logvar), Algorithm 1's. Where the head has converged it is 1 / E[error | t], nearly the
    same at all t while the tangent's norm before normalisation is far above its constant; where logvar is still near
    0, its start, it is nearly `prior`.
    `prior` is w(t) = 1 / (sigma_data tan t), 140 times less at t = 1.5 than at t = 0.1: large t, where one-step
    sampling happens, is hardly trained.
    `uniform` is 1: large t counts as much as any other.

    Args:
        t: angles in radians in (0, pi/2), (rows,).
        logvar: log-variance of every row, (rows,); of no consequence but for `learned`.
        weighting: one of `LOSS_WEIGHTINGS`.
        sigma_data: standard deviation of the latents.

    Returns:
        The weight, (rows,).

    Raises:
        ValueError: if `weighting` is unknown.
    """
    if weighting not in LOSS_WEIGHTINGS:
        raise ValueError(f"`weighting` is {weighting!r}, but it must be one of {', '.join(LOSS_WEIGHTINGS)}.")
    if weighting == "uniform":
        return torch.ones_like(t)
    weight = consistency_weight(t, sigma_data)
    return weight / torch.exp(logvar) if weighting == "learned" else weight


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
    *,
    weighting: str = "learned",
) -> torch.Tensor:
    """Evaluate the loss mean(weight (F - F_sg - g)^2 + logvar), its weight as in `loss_weight` (Alg. 1).

    Its value says little, as F equals F_sg; its gradient with respect to F is -2 weight g over the number of elements.
    The term + logvar is that of a learned weight alone, whose best logvar it makes log(w(t) E[error | t]).

    Args:
        trig_output: F with gradient, (batch, channels, height, width).
        trig_output_sg: F without gradient, the shape of `trig_output`.
        tangent: normalised g, the shape of `trig_output`.
        logvar: log-variance of every sample, (batch,).
        timesteps: t in radians in (0, pi/2), (batch,).
        sigma_data: standard deviation of the latents.
        weighting: one of `LOSS_WEIGHTINGS`.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        ValueError: if `weighting` is unknown.
    """
    error = consistency_error(trig_output, trig_output_sg, tangent)
    logvar = logvar.to(error.dtype)
    weighted = loss_weight(timesteps.to(error.dtype), logvar, weighting, sigma_data) * error
    return (weighted + logvar if weighting == "learned" else weighted).mean()


def clean_error(
    trig_output: torch.Tensor,
    latents: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    sigma_data: float = SIGMA_DATA,
) -> torch.Tensor:
    """Evaluate the squared error of every element of f(x_t, t), on unit scale.

    Args:
        trig_output: F, (batch, channels, height, width).
        latents: x_t, the shape of `trig_output`.
        target: the clean latent that f(x_t, t) is to be, the shape of `trig_output`.
        timesteps: t in radians, (batch,).
        sigma_data: standard deviation of the latents.

    Returns:
        The errors, the shape of `trig_output`, in float32 or wider.
    """
    wide = torch.promote_types(trig_output.dtype, torch.float32)
    prediction = consistency_output(latents.to(wide), trig_output.to(wide), timesteps.to(wide), sigma_data)
    return ((prediction - target.to(wide)) / sigma_data).square()


def endpoint_loss(
    trig_output: torch.Tensor,
    latents: torch.Tensor,
    pred_original_sample: torch.Tensor,
    timesteps: torch.Tensor,
    sigma_data: float = SIGMA_DATA,
    *,
    loss_type: str = "norm",
) -> torch.Tensor:
    """Evaluate how far f(x_t, t) is from x_0 / sigma_data: every point of a trajectory is to lead to its end at once.

    It has the same solution as the consistency loss, the map from a point to the end of its ODE trajectory, and is
    learnt faster at first: a warm-up, known as ODE initialisation, and no part of the paper. The types differ where
    the map has not been learnt. With e the root-mean-square error of a row's latent,
    `l2` is the mean of e^2. Of ends that the network cannot tell apart its answer is the mean: a blur, or a picture
    and its mirror image at once.
    `norm` is the mean of sqrt(e^2 + c^2) - c, a pseudo-Huber loss of whole latents. Its answer is their geometric
    median: of two pictures the likelier one.

    Args:
        trig_output: F with gradient, (batch, channels, height, width).
        latents: x_t, the shape of `trig_output`.
        pred_original_sample: x_0 at the end of the trajectory, the shape of `trig_output`.
        timesteps: t in radians, (batch,).
        sigma_data: standard deviation of the latents.
        loss_type: one of `ENDPOINT_LOSS_TYPES`.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        ValueError: if `loss_type` is unknown.
    """
    if loss_type not in ENDPOINT_LOSS_TYPES:
        raise ValueError(f"`loss_type` is {loss_type!r}, but it must be one of {', '.join(ENDPOINT_LOSS_TYPES)}.")
    square = clean_error(trig_output, latents, pred_original_sample, timesteps, sigma_data)
    if loss_type == "l2":
        return square.mean()
    return (torch.sqrt(square.flatten(1).mean(1) + NORM_CONSTANT**2) - NORM_CONSTANT).mean()
