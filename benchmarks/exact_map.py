"""What a student that has learned everything would draw: every step solves the guided teacher's ODE to its end.

    python -m benchmarks.exact_map few|many     # some 20 minutes on a CPU core; can be resumed

Consistency sampling noises the end of one solution and solves from there: the noised point is one of the teacher's
forward process, not of its ODE. What that does to pictures is no matter of training, and is what a student's 2 and 4
steps are to be compared with. Tried with guidance in all steps, in the first alone, and in none, and with the noise
that a solution implies in place of a fresh one; distances are to what the stock pipeline draws in 20 steps at the
first step's guidance from other noises. Writes
benchmarks/results/exact_map_<prompts>.json and .md.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from diffusers import SanaPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diffusers_tbcm import TBCMScheduler
from diffusers_tbcm.backbones.sana import decode_latents
from diffusers_tbcm.data.embeddings import UNCONDITIONAL, PromptEncoder
from diffusers_tbcm.draws import draw_generator, draw_noise
from diffusers_tbcm.evaluation.features import MobileNetFeatures
from diffusers_tbcm.files import written_beside
from diffusers_tbcm.trajectory import record_trajectory, reference_route
from diffusers_tbcm.trigflow import SIGMA_DATA, TrigFlowTransformer
from examples.tbcm.quickstart import (
    BATCH_SIZE,
    GUIDANCE_SCALE,
    MAX_SEQUENCE_LENGTH,
    REFERENCE_SEED,
    SEED,
    STUDENT_STEPS,
    TEACHER_STEPS,
    Task,
    draw,
)

from .common import EMBEDDED_TEACHER, default_device, machine, write_results
from .emoji_judge import DISTANCE, TASKS, study_parser


SHIFT = 3.0  # of the stock pipeline's times
WAYS = (  # guidance of the first step, of others, and whether others begin from fresh noise
    (GUIDANCE_SCALE, GUIDANCE_SCALE, True),
    (GUIDANCE_SCALE, GUIDANCE_SCALE, False),
    (GUIDANCE_SCALE, 1.0, True),
    (1.0, 1.0, True),
)
LEAST_STEP = 0.02  # radians: a solution's first step is no shorter


def times_from(t: float) -> torch.Tensor:
    """The teacher's own times below t, t before them: where the ODE is solved from t on.

    Args:
        t: angle in radians.

    Returns:
        (n,), descending.
    """
    route = reference_route(TEACHER_STEPS, SHIFT)
    return torch.cat([torch.tensor([t]), route[route < t - LEAST_STEP]])


class ExactMap:
    """The guided teacher's map from a point of noise level t to the end of its ODE, and sampling with it.

    Args:
        pipeline: the teacher.
        guidance_scale: classifier-free guidance weight of the first step.
        later_scale: that of the others.
        stochastic_sampling: as in `TBCMScheduler`, which samples.
    """

    def __init__(
        self, pipeline: SanaPipeline, guidance_scale: float, later_scale: float, stochastic_sampling: bool
    ) -> None:
        self._pipeline, self._guidance_scale, self._later_scale = pipeline, guidance_scale, later_scale
        self._scheduler = TBCMScheduler(stochastic_sampling=stochastic_sampling)
        self._teacher = TrigFlowTransformer(pipeline.transformer)
        self._encode = PromptEncoder(pipeline, max_sequence_length=MAX_SEQUENCE_LENGTH)

    def draw(self, prompts: Sequence[str], first: int) -> dict[int, list[Image.Image]]:
        """Draw prompts in every number of steps, from the same first noise.

        Args:
            prompts: of a batch.
            first: place of the first one among all: the noises depend on it and the seed.

        Returns:
            Pictures by number of steps.
        """
        device, config = self._pipeline.device, self._pipeline.transformer.config
        generators = [draw_generator(first + place, SEED) for place in range(len(prompts))]
        shape = (config.in_channels, config.sample_size, config.sample_size)
        text, negative = self._encode([*prompts]), self._encode([UNCONDITIONAL])

        def solve(sample: torch.Tensor, t: float, guidance_scale: float) -> torch.Tensor:
            times = times_from(t).to(device).expand(len(prompts), -1)
            scale = torch.full((len(prompts),), guidance_scale, device=device)
            solution = record_trajectory(self._teacher, sample / SIGMA_DATA, times, text, negative, scale)
            return solution.pred_original_sample

        drawn: dict[int, torch.Tensor] = {}
        noise = SIGMA_DATA * draw_noise(shape, generators, device=device)
        for steps in STUDENT_STEPS:
            self._scheduler.set_timesteps(steps, device=device)
            latents = noise
            for number, t in enumerate(self._scheduler.timesteps[:-1]):
                scale = self._later_scale if number else self._guidance_scale
                known = drawn and not number  # the first solution of every number of steps is the same
                end = drawn[1] if known else solve(latents, t.item(), scale)
                model_output = (torch.cos(t) * latents - end) / torch.sin(t)  # whose x_0 is the end
                latents = self._scheduler.step(model_output, t, latents, generators).prev_sample
            drawn[steps] = latents
        processor = self._pipeline.image_processor
        with torch.no_grad():
            return {
                steps: processor.postprocess(decode_latents(self._pipeline.vae, latents / SIGMA_DATA))
                for steps, latents in drawn.items()
            }


def features_of(
    task: Task, guidance_scale: float, later_scale: float, stochastic_sampling: bool, kept: Path
) -> dict[str, torch.Tensor]:
    """Features of the stock pipeline's pictures, and of the exact map's by number of steps, each drawn once."""
    pipeline = SanaPipeline.from_pretrained(EMBEDDED_TEACHER).to(default_device())
    extractor = MobileNetFeatures().to(default_device())

    def keep(name: str, pictures: Iterator[dict[str, list[Image.Image]]]) -> dict[str, torch.Tensor]:
        file = kept / f"{name}.safetensors"
        if not file.exists():
            parts: dict[str, list[torch.Tensor]] = {}
            for batch in pictures:
                for key, drawn in batch.items():
                    parts.setdefault(key, []).append(extractor.extract(drawn).cpu())
            with written_beside(file) as partial:
                save_file({key: torch.cat(part) for key, part in parts.items()}, partial)
        return load_file(file)

    def stock() -> Iterator[dict[str, list[Image.Image]]]:
        for name, seed in (("teacher", SEED), ("reference", REFERENCE_SEED)):
            yield {name: draw(pipeline, task.prompts, TEACHER_STEPS, guidance_scale=guidance_scale, seed=seed)}

    def exact() -> Iterator[dict[str, list[Image.Image]]]:
        exact_map = ExactMap(pipeline, guidance_scale, later_scale, stochastic_sampling)
        for first in tqdm(range(0, len(task.prompts), BATCH_SIZE), desc="exact map", unit="batch"):
            drawn = exact_map.draw(task.prompts[first : first + BATCH_SIZE], first)
            yield {str(steps): pictures for steps, pictures in drawn.items()}

    name = f"exact_{guidance_scale:g}_{later_scale:g}{'' if stochastic_sampling else '_predicted_noise'}"
    return keep(f"stock_{guidance_scale:g}", stock()) | keep(name, exact())


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("exact_map", __doc__)
    args = parser.parse_args(argv)
    task = TASKS[args.prompts]()
    kept = args.work_dir / args.prompts
    kept.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for guidance_scale, later_scale, stochastic_sampling in WAYS:
        features = features_of(task, guidance_scale, later_scale, stochastic_sampling, kept)
        judge = task.judge(features.pop("reference"))
        teacher = features.pop("teacher")
        drawn = [("teacher", TEACHER_STEPS, teacher)]
        drawn += [("exact map", steps, features[str(steps)]) for steps in STUDENT_STEPS]
        for model, steps, each in drawn:
            distance = judge.distance(each)
            row: dict[str, Any] = {"guidance": guidance_scale, "later steps": later_scale}
            row |= {"noise": "fresh" if stochastic_sampling else "predicted", "model": model, "steps": steps}
            row[DISTANCE], row["interval"] = round(distance.value, 2), f"{distance.low:.1f} to {distance.high:.1f}"
            if model != "teacher":
                less = judge.distance(each, features["1"])
                row["less 1 step"] = "" if steps == 1 else f"{less.value:+.1f} ({less.low:+.1f} to {less.high:+.1f})"
            row["diversity / teacher's"] = round(judge.diversity(each), 2)
            row["top-5 retrieval"] = round(judge.retrieval(each), 3)
            rows.append(row)
    details = {"prompts": args.prompts, "pictures": len(task.prompts), "seed": SEED, **machine(default_device())}
    write_results(f"exact_map_{args.prompts}", pandas.DataFrame(rows), details, args.output_dir)


if __name__ == "__main__":
    main()
