"""A teacher that answers smoothly to s made from one that sees 1000 s, without a picture: v'(x, s) = v(x, 1000 s).

Only the embedding of time has to change, and that is a function of one number. A plain teacher embeds 1000 s through
sinusoids with periods from 6 to 60,000, so that its embedding e jitters between neighbouring s, and de/ds with it. The
new one of a Sana sees s itself through the same sinusoids, that of other families the slow ones of 1000 s alone, as
their pipelines feed nothing else. All of these are nearly straight on [0, 1]: what it fits is the smooth part.
What the fit leaves is trained away where the teacher goes by itself: mean ||v'(x, s) - v(x, 1000 s)||^2 at points of
its own trajectories, for both branches of its guidance. The recipe is ours; no paper has it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .backbones.time_embedding import time_layers
from .dual import Dual
from .flow import FlowTransformer, flow_step
from .guidance import combine_branches, guidance_branches
from .rows import Recording, TrainingRows
from .text import Text


FIT_POINTS = 4001  # times in [0, 1] that an embedding is fitted at: four for each of a plain teacher's own
LARGEST_SLOPES = (3.0, 6.0, 12.0, 25.0, 50.0)  # of a hidden unit in s; a unit bends over about 1 / its slope
FITTED_UNITS = 64  # of the embedder's hidden units
NEARLY = 1.1  # times the smallest residual
RIDGE = 1e-6  # of the least squares, over the mean variance of the regressors


def ridge_regression(inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve min ||inputs @ weight + offset - outputs||^2 + r ||weight||^2, r being `RIDGE` times what inputs vary by.

    Args:
        inputs: (rows, n), float64.
        outputs: (rows, m), float64.

    Returns:
        weight, (n, m), and offset, (m,).
    """
    middle, target = inputs.mean(0), outputs.mean(0)
    inputs, outputs = inputs - middle, outputs - target
    gram = inputs.T @ inputs
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, inputs.T @ outputs)
    return weight, target - middle @ weight


def fit_embedder(target: torch.Tensor, features: torch.Tensor, s: torch.Tensor, units: int) -> dict[str, torch.Tensor]:
    """Fit an embedder of features of s to an embedding of time, in closed form.

    Hidden unit k is silu(a_k (s - c_k)), |a_k| from 1 to a largest slope, of either sign, c_k even over [0, 1]. The
    second layer is the ridge regression of e on the units. A linear layer's least squares are the same under any fixed
    weight of its outputs, so that W^T W, by which the modulation layer W weighs them, changes nothing. The largest
    slope is the smallest of `LARGEST_SLOPES` that fits nearly as well as any: it follows e, and not its jitter. Units
    beyond `FITTED_UNITS` are 0: Adam moves all weights by as much, and e by the sum over the units.

    Args:
        target: e at the times, (times, dim), float64.
        features: what the embedder sees of the times, (times, channels), float64.
        s: the times, even over [0, 1], (times,), float64.
        units: hidden units of the embedder.

    Returns:
        The weights of diffusers' `TimestepEmbedding`, by name, float64.
    """
    # s as a sum of all features, by small weights: what each is rounded by averages out.
    to_s, offset = ridge_regression(features, s[:, None])
    unit = torch.arange(min(units, FITTED_UNITS), dtype=s.dtype)
    centres = unit * (5**0.5 - 1) / 2 % 1  # multiples of the golden ratio: even, and in another order than the slopes
    fits = []
    for largest in LARGEST_SLOPES:
        slopes = largest ** (unit / max(1, len(unit) - 1)) * (1 - 2 * (unit % 2))
        first, first_bias = slopes[:, None] * to_s[:, 0], slopes * (offset - centres)
        hidden = F.silu(features @ first.T + first_bias)
        second, second_bias = ridge_regression(hidden, target)
        weights = {
            "linear_1.weight": F.pad(first, (0, 0, 0, units - len(unit))),
            "linear_1.bias": F.pad(first_bias, (0, units - len(unit))),
            "linear_2.weight": F.pad(second.T, (0, units - len(unit))),
            "linear_2.bias": second_bias,
        }
        fits.append((relative_error(hidden @ second + second_bias, target), weights))
    best = min(residual for residual, _ in fits)
    return next(weights for residual, weights in fits if residual <= NEARLY * best)


def without_biases(weights: dict[str, torch.Tensor], features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Write an embedder without biases: a sum of features that is 1 is the first layer's, another unit the second's.

    Args:
        weights: of `fit_embedder`.
        features: what the embedder sees, (times, channels), float64; slow cosines among them.

    Returns:
        The weights of a `TimestepEmbedding` without biases and with a unit more, by name, float64.
    """
    gram = features.T @ features
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    one = torch.linalg.solve(gram, features.sum(0))
    biases = F.pad(weights["linear_1.bias"], (0, 1), value=1.0)
    constant = weights["linear_2.bias"] / F.silu(biases[-1])
    return {
        "linear_1.weight": F.pad(weights["linear_1.weight"], (0, 0, 0, 1)) + torch.outer(biases, one),
        "linear_2.weight": torch.cat([weights["linear_2.weight"], constant[:, None]], dim=1),
    }


@torch.no_grad()
def to_dense_time(teacher: FlowTransformer) -> FlowTransformer:
    """Make a network in dense time of the very parameters of one that is not, but for the embedder of time.

    The teacher is not run; its embedder is. The fit is computed in float64 on the CPU.

    Args:
        teacher: v, without a guidance embedder, in float32; it is left as it is.

    Returns:
        v', whose network shares all parameters with the teacher's but the embedder's, and whose config has the mark of
        dense time, if its family has one.
    """
    network, backbone = teacher.transformer, teacher.backbone
    shared = [part for name, part in network.named_parameters() if not name.startswith(backbone.TIME_EMBEDDER)]
    prepared = copy.deepcopy(network, {id(part): part for part in shared})
    layers = time_layers(prepared.get_submodule(backbone.TIME_EMBEDDER))
    s = torch.linspace(0, 1, FIT_POINTS, dtype=torch.float64)
    times = s.float().to(network.device)
    target = backbone.embed_time(network, times * teacher.timestep_scale, None)
    features = backbone.time_features(network, times * backbone.DENSE_TIME_SCALE).cpu().double()
    biased = layers[0].bias is not None
    weights = fit_embedder(target.cpu().double(), features, s, layers[0].out_features - (not biased))
    if not biased:
        weights = without_biases(weights, features)
    for name, weight in weights.items():
        layer, part = name.split(".")
        getattr(layers[layer == "linear_2"], part).copy_(weight)
    backbone.name_timestep_scale(prepared, backbone.DENSE_TIME_SCALE)
    return FlowTransformer(prepared, backbone.DENSE_TIME_SCALE)


@dataclass(frozen=True)
class EmbeddingFit:
    """How the embedding e' of time of a prepared network compares with its teacher's e, over s in [0, 1].

    Args:
        residual: ||e' - e|| / ||e||.
        modulation_residual: the same of what the modulation layers make of them, which the blocks see.
        slope_before: median of |de/ds| / |e|.
        slope_after: that of e'.
    """

    residual: float
    modulation_residual: float
    slope_before: float
    slope_after: float


@torch.no_grad()
def compare_embeddings(teacher: FlowTransformer, prepared: FlowTransformer) -> EmbeddingFit:
    """Say how close the embedding of time of a prepared network is to its teacher's, and how steep both are.

    Args:
        teacher: v.
        prepared: v', of `to_dense_time`.

    Returns:
        The figures.
    """
    backbone, embedded, slopes = teacher.backbone, [], []
    for network in (teacher, prepared):
        s = torch.linspace(0, 1, FIT_POINTS, device=network.transformer.device)
        times = Dual(s, torch.ones_like(s)) * network.timestep_scale
        value: Any = backbone.embed_time(network.transformer, times, None)  # type: ignore[arg-type]
        embedded.append(value.primal)
        slopes.append((value.tangent.norm(dim=1) / value.primal.norm(dim=1)).median().item())
    modulations = [backbone.modulation(teacher.transformer, value) for value in embedded]
    return EmbeddingFit(
        relative_error(embedded[1], embedded[0]), relative_error(modulations[1], modulations[0]), *slopes
    )


@torch.no_grad()
def record_branches(
    teacher: FlowTransformer,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    text: Text,
    negative_text: Text,
    guidance_scale: torch.Tensor,
) -> Recording:
    """Generate from noise with the teacher by guided Euler steps; keep every point, and both branches' v there.

    Args:
        teacher: v, in its own time.
        noise: standard normal, (batch, channels, height, width).
        sigmas: the times s, (batch, N), every row descending from 1.
        text: of the batch's prompts.
        negative_text: of one negative prompt.
        guidance_scale: classifier-free guidance weight, (batch,).

    Returns:
        Rows of flow matching: x_s and s, and as velocity v of the negative prompt and of the prompt, (batch, N, 2,
        channels, height, width), in float32 or wider.
    """
    sample = noise.to(torch.promote_types(noise.dtype, torch.float32))
    sigmas = sigmas.to(sample)
    branches = guidance_branches(teacher, text, negative_text)
    latents, velocities = [], []
    next_sigmas = torch.cat([sigmas[:, 1:], torch.zeros_like(sigmas[:, :1])], dim=1)
    with teacher.backbone.keep_text(teacher.transformer) as kept:
        for s, next_s in zip(sigmas.unbind(1), next_sigmas.unbind(1), strict=True):
            both = teacher(torch.cat([sample, sample]), s.repeat(2), **branches.arguments())
            unconditional, conditional = both.chunk(2)
            branches = kept(branches)
            latents.append(sample)
            velocities.append(torch.stack([unconditional, conditional], dim=1))
            guided = combine_branches(unconditional, conditional, guidance_scale)
            sample = flow_step(sample, teacher.rescale_guided(guided, conditional, sample, s), s, next_s)
    return Recording(
        latents=torch.stack(latents, dim=1),
        velocity=torch.stack(velocities, dim=1),
        timesteps=sigmas,
        pred_original_sample=sample,
        text=text,
        guidance_scale=guidance_scale,
    )


def branch_inputs(rows: TrainingRows, negative_text: Text) -> tuple[torch.Tensor, torch.Tensor, Text]:
    """Give what a network is to see of rows: each with the negative prompt, then each with its own.

    Args:
        rows: of `record_branches`.
        negative_text: of the negative prompt.

    Returns:
        x_s, (2 rows, channels, height, width), s, (2 rows,), and the text.
    """
    text = Text.cat([negative_text.expand(len(rows.text)), rows.text])
    return rows.latents.repeat(2, 1, 1, 1), rows.timesteps.repeat(2), text


def branch_velocities(rows: TrainingRows) -> torch.Tensor:
    """Give the teacher's v of rows, in the order of `branch_inputs`.

    Args:
        rows: of `record_branches`.

    Returns:
        (2 rows, channels, height, width).
    """
    return rows.velocity.transpose(0, 1).flatten(0, 1)


def alignment_loss(velocity: torch.Tensor, rows: TrainingRows) -> torch.Tensor:
    """Evaluate mean ||v'(x, s) - v(x, 1000 s)||^2, both branches, a mean over elements.

    Args:
        velocity: v' of `branch_inputs`.
        rows: of `record_branches`.

    Returns:
        A scalar.
    """
    return F.mse_loss(velocity, branch_velocities(rows))


def relative_error(value: torch.Tensor, target: torch.Tensor) -> float:
    """Evaluate ||value - target|| / ||target|| over all elements."""
    return ((value - target).norm() / target.norm()).item()


@torch.no_grad()
def time_response(network: FlowTransformer, rows: TrainingRows, negative_text: Text) -> torch.Tensor:
    """Evaluate ||dv/ds|| / ||v|| with x held, what a tangent has of the time embedding; one pass, by dual numbers.

    Args:
        network: v of the teacher, or v'.
        rows: of `record_branches`.
        negative_text: of the negative prompt.

    Returns:
        (2 rows,), in the order of `branch_inputs`.
    """
    sample, s, text = branch_inputs(rows, negative_text)
    velocity: Any = network(sample, Dual(s, torch.ones_like(s)), **text.arguments())
    return velocity.tangent.flatten(1).norm(dim=1) / velocity.primal.flatten(1).norm(dim=1)
