"""CDM where everything is known: a mixture of eight modes in the plane, an exact teacher, a small network.

    python -m benchmarks.cdm_mixture        # about a minute a variant on a core

Four classes have two opposite modes each. The student starts as the teacher, so one step of it lands between its two
modes; it is to reach the modes themselves. Three controls have to fail: the sign of DM and CDM flipped, a critic that
never learns, and CA alone. Writes benchmarks/results/cdm_mixture.json, .md and a plot.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import pandas
import torch
from torch import nn

from diffusers_tbcm.draws import draw_generator
from diffusers_tbcm.flow import add_flow_noise, flow_prediction, flow_step
from diffusers_tbcm.matching import augmentation_loss, critic_loss, distribution_loss, draw_tau, merge_critic
from diffusers_tbcm.rollout import draw_anchors, draw_sigmas, record_rollout
from diffusers_tbcm.rows import TrainingRows

from .common import RESULTS, machine, write_results
from .toy.mixture import CLASSES, energy_distance, exact_velocity, modes, real_samples, text_of
from .toy.network import Network, pretrain


matplotlib.use("Agg")
from matplotlib import pyplot


BATCH_SIZE, LEARNING_RATE, MAX_STEPS, ANCHOR_RANGE = 256, 2e-4, 8, (0.02, 0.98)
UPDATES, POINTS = 2000, 4096
VARIANTS = ("CDM", "flipped sign", "critic never trained", "CA alone")


@dataclass
class Roles:
    """The networks of a run: the teacher is exact."""

    student: Network
    critic: Network
    average: Network


def critic_step(roles: Roles, rows: TrainingRows, generator: torch.Generator) -> torch.Tensor:
    """The critic's loss at the rows' predictions."""
    tau = draw_tau(torch.ones_like(rows.timesteps), generator)
    noise = torch.randn(rows.latents.shape, generator=generator)
    noised = add_flow_noise(rows.pred_original_sample, noise, tau)
    return critic_loss(roles.critic(noised, tau, **rows.text.arguments()), rows.pred_original_sample, noise)


def student_loss(
    roles: Roles, rows: TrainingRows, generator: torch.Generator, *, alpha: float, sign: float, matching: bool
) -> torch.Tensor:
    """CA + DM + CDM; without CA where alpha is 0."""
    words = rows.text.arguments()
    empty = {**words, "encoder_hidden_states": torch.zeros_like(words["encoder_hidden_states"])}

    def judged(prediction: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tau = draw_tau(upper, generator)
        noise = torch.randn(prediction.shape, generator=generator)
        return add_flow_noise(prediction.detach(), noise, tau), tau

    def loss_of(prediction: torch.Tensor) -> torch.Tensor:
        noised, tau = judged(prediction, torch.ones(len(prediction)))
        with torch.no_grad():
            real = flow_prediction(noised, exact_velocity(noised, tau, **words), tau)
            fake = flow_prediction(noised, roles.critic(noised, tau, **words), tau)
        return distribution_loss(prediction, real, real - sign * (real - fake))

    def predict(sample: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return flow_prediction(sample, roles.student(sample, s, **words), s)

    prediction = predict(rows.latents, rows.timesteps)
    loss = torch.zeros(())
    if alpha:
        noised, tau = judged(prediction, rows.timesteps)
        with torch.no_grad():
            real = flow_prediction(noised, exact_velocity(noised, tau, **words), tau)
            unconditional = flow_prediction(noised, exact_velocity(noised, tau, **empty), tau)
        loss = loss + augmentation_loss(prediction, real, unconditional, alpha)
    if matching:
        elsewhere = draw_tau(torch.ones_like(rows.timesteps), generator)
        moved = flow_step(rows.latents, rows.velocity, rows.timesteps, elsewhere)
        loss = loss + loss_of(prediction) + loss_of(predict(moved, elsewhere))
    return loss


def distil(
    start: Network, variant: str, updates: int = UPDATES, seed: int = 0, *, guidance_scale: float = 1.0
) -> Network:
    """Train a student of the exact teacher; gives its averaged weights."""
    roles = Roles(*(copy.deepcopy(start) for _ in range(3)))
    critic_optimizer, student_optimizer = (
        torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0)
        for network in (roles.critic, roles.student)
    )
    for step in range(2 * updates):
        generator = draw_generator(step, seed)
        classes = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
        sigmas = draw_sigmas(generator, max_steps=MAX_STEPS, anchor_range=ANCHOR_RANGE)
        rows = record_rollout(
            roles.student,
            torch.randn(BATCH_SIZE, 2, generator=generator),
            sigmas,
            draw_anchors(len(sigmas) - 1, BATCH_SIZE, generator),
            text_of(classes),
        ).rows()
        if variant != "critic never trained":
            critic_optimizer.zero_grad()
            critic_step(roles, rows, generator).backward()
            critic_optimizer.step()
            merge_critic(roles.critic, roles.student)
        if step % 2 == 0:
            continue
        student_optimizer.zero_grad()
        student_loss(
            roles,
            rows,
            generator,
            alpha=7.0 if variant == "CA alone" else guidance_scale - 1,
            sign=-1.0 if variant == "flipped sign" else 1.0,
            matching=variant != "CA alone",
        ).backward()
        student_optimizer.step()
        decay = min(0.999, (1 + step // 2) / (10 + step // 2))
        with torch.no_grad():
            for average, parameter in zip(roles.average.parameters(), roles.student.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
    return roles.average


@torch.no_grad()
def draw(network: nn.Module, num_inference_steps: int, noise: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Sample by Euler steps at equal times."""
    sigmas = torch.linspace(1, 0, num_inference_steps + 1)
    sample = noise
    for s, next_s in pairwise(sigmas):
        at = s.expand(len(noise))
        sample = flow_step(sample, network(sample, at, **text_of(classes).arguments()), at, next_s.expand(len(noise)))
    return sample


def distance_per_class(network: nn.Module, num_inference_steps: int, points: int = POINTS, seed: int = 1) -> float:
    """The energy distance to the mixture, a mean over classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(points) % CLASSES
    drawn = draw(network, num_inference_steps, torch.randn(points, 2, generator=generator), classes)
    real = real_samples(classes, generator)
    distances = [energy_distance(drawn[classes == one], real[classes == one]) for one in range(CLASSES)]
    return sum(distances) / CLASSES


def plot(networks: dict[str, Network], points: int = 1000) -> pyplot.Figure:
    """One-step samples of every student, coloured by class."""
    generator = torch.Generator().manual_seed(2)
    classes, noise = torch.arange(points) % CLASSES, torch.randn(points, 2, generator=generator)
    figure, axes = pyplot.subplots(2, len(networks), figsize=(3 * len(networks), 6), squeeze=False)
    for column, (name, network) in enumerate(networks.items()):
        for row, steps in enumerate((1, 2)):
            axis, drawn = axes[row][column], draw(network, steps, noise, classes)
            axis.scatter(*drawn.T, c=classes, s=3, cmap="tab10", vmax=9)
            axis.scatter(*modes().T, c="black", marker="+")
            axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"{name}, {steps} step{'s' * (steps > 1)}", fontsize=9)
    figure.tight_layout()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=UPDATES, help="of the student")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    networks = {"untrained": pretrain(seed=args.seed)}
    records = []
    for name in ("untrained", *VARIANTS):
        start = time.perf_counter()
        if name not in networks:
            networks[name] = distil(networks["untrained"], name, args.updates, args.seed)
        seconds = round(time.perf_counter() - start, 1)
        distances = {f"{steps} steps": round(distance_per_class(networks[name], steps), 4) for steps in (1, 2, 4, 8)}
        records.append({"student": name, **distances, "seconds": seconds})
        print(records[-1], flush=True)
    settings = {"updates": args.updates, "seed": args.seed, **machine(torch.device("cpu"))}
    write_results("cdm_mixture", pandas.DataFrame(records), settings)
    plot(networks).savefig(RESULTS / "cdm_mixture.png", dpi=100)


if __name__ == "__main__":
    main()
