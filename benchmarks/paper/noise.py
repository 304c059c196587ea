"""Figures 3 and 8: the equivalent noise (Eq. 8) along diffusion and along generation."""

import argparse
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffusers_tbcm.evaluation.grid import image_grid
from diffusers_tbcm.trajectory import equivalent_noise
from examples.tbcm.mini_teacher.emoji_metrics import SEED, load_evaluation

from .teacher_trajectories import CELL_SIZE, EULER, SIGMA_DATA, Generation, Teacher, diffuse
from .trajectory_statistics import cosine_similarity, mean_and_error, neighbour_correlation, root_mean_square


SHOWN_PROMPT = "a fluent 3d emoji of a dolphin"
SHOWN_ANGLES = (1.5, 1.3, 1.1, 0.9, 0.6, 0.3, 0.1)  # the recorded angles nearest to these
PROCESSES = {
    "diffusion, x_0 itself": "tab:blue",
    "diffusion, f(x_t, t)": "tab:cyan",
    "generation, f(x_t, t)": "tab:red",
    "generation, final x_0": "tab:orange",
}
MAPPED_PROCESSES = ("diffusion, f(x_t, t)", "generation, f(x_t, t)")  # two of one noise would be pairs in a map
FOLDS = 5
STATISTICS = {
    "cosine similarity to the initial noise": lambda noise, initial, original: cosine_similarity(noise, initial),
    "cosine similarity to x_0": lambda noise, initial, original: cosine_similarity(noise, original),
    "root mean square / sigma_data": lambda noise, initial, original: root_mean_square(noise) / SIGMA_DATA,
    "correlation of adjacent pixels": lambda noise, initial, original: neighbour_correlation(noise),
}


def draw_noise(args: argparse.Namespace) -> dict[str, Any]:
    """Figure 3 as pictures of one prompt, Figure 8 as curves over all and as t-SNE maps."""
    prompts = [item.prompt for item in load_evaluation() if not item.held_out and item.prompt != SHOWN_PROMPT]
    teacher = Teacher([SHOWN_PROMPT, *prompts[: args.prompts - 1]], args.work_dir)
    processes, curves, noises = {}, {}, {}
    for guidance_scale in args.guidance_scales:
        generation = teacher.generate(EULER, args.route_steps, guidance_scale)
        diffusion_noise, predictions = teacher.diffuse(EULER, args.route_steps, guidance_scale)
        timesteps = generation.timesteps[0]
        processes[guidance_scale] = generation, diffusion_noise
        noises[guidance_scale] = equivalent_noises(generation, diffusion_noise, predictions)
        curves[guidance_scale] = statistics(noises[guidance_scale], generation, diffusion_noise)
    shown = [int((timesteps - angle).abs().argmin()) for angle in SHOWN_ANGLES]

    first = args.guidance_scales[0]
    grid = picture_rows(teacher, *processes[first], noises[first], shown)
    grid.save(args.output_dir / "figure_3_equivalent_noise.png")
    curve_figure(timesteps, curves).savefig(args.output_dir / "figure_8_curves.png", dpi=110)
    map_figure(timesteps, shown, noises).savefig(args.output_dir / "figure_8_tsne.png", dpi=110)
    return {
        "prompts": len(teacher.prompts),
        "route_steps": args.route_steps,
        "timesteps": [round(t, 4) for t in timesteps.tolist()],
        "statistics (mean, standard error) at every timestep": {
            f"guidance {guidance_scale:g}": {
                process: {
                    name: [[round(number, 4) for number in pair] for pair in pairs] for name, pairs in table.items()
                }
                for process, table in by_process.items()
            }
            for guidance_scale, by_process in curves.items()
        },
        "two-sample accuracy of generation by f(x_t, t) (mean, standard error)": [
            {
                "guidance": guidance_scale,
                "t": round(timesteps[index].item(), 4),
                **{
                    f"against {process}": two_sample_accuracy(
                        by_process["generation, f(x_t, t)"][:, index], by_process[process][:, index]
                    )
                    for process in ("diffusion, x_0 itself", "diffusion, f(x_t, t)")
                },
            }
            for guidance_scale, by_process in noises.items()
            for index in shown
        ],
    }


def equivalent_noises(
    generation: Generation, diffusion_noise: torch.Tensor, diffusion_predictions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Evaluate Eq. 8 for each of `PROCESSES`, all (prompts, N - 1, channels, height, width)."""
    shape, timesteps = generation.latents.shape, generation.timesteps.flatten()

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if tensor.ndim == len(shape) else tensor[:, None].expand(shape)).flatten(0, 1)

    original, generated = flat(generation.original), flat(generation.latents)
    diffused = diffuse(original, flat(diffusion_noise), timesteps)
    predicted = [
        (diffused, original),
        (diffused, flat(diffusion_predictions)),
        (generated, flat(generation.predictions)),
        (generated, original),
    ]
    return {
        process: equivalent_noise(sample, prediction, timesteps).unflatten(0, shape[:2])
        for process, (sample, prediction) in zip(PROCESSES, predicted, strict=True)
    }


def statistics(
    noises: dict[str, torch.Tensor], generation: Generation, diffusion_noise: torch.Tensor
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Mean and standard error over prompts of each of `STATISTICS`, by process and timestep."""
    initial = {process: diffusion_noise if "diffusion" in process else generation.noise for process in PROCESSES}
    return {
        process: {
            name: [mean_and_error(measure(at_t, initial[process], generation.original)) for at_t in noise.unbind(1)]
            for name, measure in STATISTICS.items()
        }
        for process, noise in noises.items()
    }


def picture_rows(
    teacher: Teacher,
    generation: Generation,
    diffusion_noise: torch.Tensor,
    noises: dict[str, torch.Tensor],
    shown: list[int],
) -> Image.Image:
    """Figure 3: the first prompt's samples and equivalent noises, decoded."""
    timesteps = generation.timesteps[0, shown]
    original, noise = (tensor[:1].expand(len(shown), -1, -1, -1) for tensor in (generation.original, diffusion_noise))
    rows = {
        "diffusion: x_t": diffuse(original, noise, timesteps),
        "diffusion: noise by x_0": noises["diffusion, x_0 itself"][0, shown],
        "diffusion: noise by f(x_t, t)": noises["diffusion, f(x_t, t)"][0, shown],
        "generation: x_t": generation.latents[0, shown],
        "generation: f(x_t, t)": generation.predictions[0, shown],
        "generation: noise by f(x_t, t)": noises["generation, f(x_t, t)"][0, shown],
        "generation: noise by final x_0": noises["generation, final x_0"][0, shown],
    }
    pictures = [teacher.decode(latents) for latents in rows.values()]
    return image_grid(pictures, [f"t = {t:.2f}" for t in timesteps.tolist()], list(rows), CELL_SIZE)


def curve_figure(
    timesteps: torch.Tensor, curves: dict[float, dict[str, dict[str, list[tuple[float, float]]]]]
) -> Figure:
    """Figure 8, curves: every statistic over t, with a band of one standard error on either side."""
    figure, axes = plt.subplots(
        len(STATISTICS), len(curves), figsize=(5 * len(curves), 10), sharex=True, sharey="row", squeeze=False
    )
    for column, (guidance_scale, by_process) in enumerate(curves.items()):
        for row, name in enumerate(STATISTICS):
            axis = axes[row, column]
            for process, color in PROCESSES.items():
                mean, error = torch.tensor(by_process[process][name]).unbind(1)
                axis.plot(timesteps, mean, color=color, label=process)
                axis.fill_between(timesteps, mean - error, mean + error, color=color, alpha=0.3, linewidth=0)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"guidance {guidance_scale:g}")
        axes[-1, column].set_xlabel("t (rad); sampling goes from right to left")
    for row, name in enumerate(STATISTICS):
        axes[row, 0].set_ylabel(name)
    axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    return figure


def map_figure(timesteps: torch.Tensor, shown: list[int], noises: dict[float, dict[str, torch.Tensor]]) -> Figure:
    """Figure 8, maps: t-SNE of all prompts' equivalent noises, a map of its own for every timestep."""
    size = (2.8 * len(shown), 3 * len(noises))
    figure, axes = plt.subplots(len(noises), len(shown), figsize=size, squeeze=False)
    for row, (guidance_scale, by_process) in enumerate(noises.items()):
        for axis, index in zip(axes[row], shown, strict=True):
            points = torch.stack([by_process[process][:, index] for process in MAPPED_PROCESSES])
            embedded = TSNE(init="pca", random_state=SEED).fit_transform(points.flatten(0, 1).flatten(1).numpy())
            for process, part in zip(MAPPED_PROCESSES, embedded.reshape(len(points), -1, 2), strict=True):
                axis.scatter(*part.T, s=5, color=PROCESSES[process], label=process)
            axis.set(title=f"guidance {guidance_scale:g}, t = {timesteps[index]:.2f}", xticks=[], yticks=[])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=2, markerscale=3)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def two_sample_accuracy(noise: torch.Tensor, other: torch.Tensor) -> list[float]:
    """How well a classifier tells two samples of equivalent noise apart: a two-sample test.

    Args:
        noise: (prompts, channels, height, width).
        other: the same prompts', the shape of `noise`.

    Returns:
        The accuracy of a logistic regression on prompts that it was not fitted on, and its standard error over
        prompts; 0.5 where the distributions do not differ in a way that it sees.
    """
    points = torch.cat([noise, other]).flatten(1).numpy()
    labels = np.repeat([0, 1], len(noise))
    prompts = np.tile(np.arange(len(noise)), 2)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
    found = cross_val_predict(classifier, points, labels, groups=prompts, cv=GroupKFold(FOLDS))
    right = torch.from_numpy(found == labels).float().view(2, -1).mean(0)
    return [round(number, 3) for number in mean_and_error(right)]
