"""Whether what a flow student draws keeps the brightness and saturation of what its teacher draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.nn import functional

from ..draws import draw_generator, draw_noise, prompt_at
from ..flow import shift_sigmas
from ..guidance import guidance_branches, guided_output
from ..rollout import Velocity, record_rollout
from ..scheduling_flow import even_sigmas
from ..text import Text
from .accelerators import ending_together
from .flow_distillation import FlowDistillation
from .run import Run


logger = get_logger(__name__)

PICTURES = 8
TEACHER_STEPS, STUDENT_STEPS = 20, 4


def fit_colours(latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Fit the mean colour of what a latent pixel stands for, as a linear function of it, by least squares.

    Args:
        latents: (batch, channels, height, width).
        pictures: what they decode to, in [0, 1], (batch, 3, height * factor, width * factor).

    Returns:
        Weights and, last, the offset, (channels + 1, 3), float64 on the CPU.
    """
    colours = functional.adaptive_avg_pool2d(pictures.double(), (latents.shape[-2], latents.shape[-1]))
    return torch.linalg.lstsq(_with_one(latents), colours.movedim(1, -1).reshape(-1, 3).cpu()).solution


def measure_tone(latents: torch.Tensor, fit: torch.Tensor) -> dict[str, float]:
    """Measure brightness and saturation of latents, without decoding them.

    Args:
        latents: (batch, channels, height, width).
        fit: from `fit_colours`.

    Returns:
        The mean of red, green and blue, and the mean of the largest of them less the smallest; black is 0, white 1.
    """
    colours = _with_one(latents) @ fit
    spread = colours.amax(1) - colours.amin(1)
    return {"brightness": colours.mean().item(), "saturation": spread.mean().item()}


class DriftWatch:
    """Rolls the student out from the same noises again and again, beside what the frozen teacher made of them.

    The teacher draws its pictures once, with guidance and in many steps, and the untrained student, which is the
    teacher without guidance, in few. A warning comes where the student leaves the teacher by more than the tolerance
    and by more than it did when untrained, once until it is back.

    Args:
        run: the run.
        distillation: with the teacher, and networks that were added.
        prompts: the run's.
        guidance_scale: of the teacher's pictures.
        every: steps from one look to the next; 0 for never.
        tolerance: how far brightness and saturation may be from the teacher's, of 1.

    Raises:
        ValueError: where the teacher's pictures are not finite.
    """

    def __init__(
        self,
        run: Run,
        distillation: FlowDistillation,
        prompts: Sequence[str],
        *,
        guidance_scale: float,
        every: int,
        tolerance: float,
    ) -> None:
        self.run, self.every, self.tolerance = run, every, tolerance
        self._shift, self._outside = distillation.shift, dict.fromkeys(("brightness", "saturation"), False)
        if every == 0:
            return
        seed, size = run.settings.seed, run.settings.train_batch_size
        self._batches: list[tuple[torch.Tensor, Text]] = []
        for draws in torch.arange(PICTURES).split(size):
            noise = draw_noise(
                distillation.latent_shape, [draw_generator(draw, seed) for draw in draws.tolist()], device=run.device
            )
            text = distillation.encode([prompts[prompt_at(draw, len(prompts), seed)] for draw in draws.tolist()])
            self._batches.append((noise, text))

        teacher, negative = distillation.teacher, distillation.negative_text

        def guided(text: Text) -> Velocity:
            branches = guidance_branches(teacher, text, negative)
            scale = torch.full((len(text),), guidance_scale, device=run.device)
            return lambda sample, s, **_: guided_output(teacher, sample, s, branches, scale)

        latents = self._roll_out(guided, TEACHER_STEPS)
        with ending_together(run.accelerator):
            if not latents.isfinite().all():
                raise ValueError(
                    "`pretrained_model_name_or_path`: what the teacher draws is not finite; try `mixed_precision` no"
                )
            self._fit = fit_colours(latents, distillation.decode(latents))
        self.teacher = measure_tone(latents, self._fit)
        self.untrained = measure_tone(self._roll_out(lambda text: teacher, STUDENT_STEPS), self._fit)

    def check(self, student: nn.Module) -> None:
        """Look at the student where that is due, log what it draws, warn of drift; every process calls this.

        Args:
            student: gives v.
        """
        run = self.run
        if self.every == 0 or run.step % self.every:
            return
        found = measure_tone(self._roll_out(lambda text: student, STUDENT_STEPS), self._fit)
        run.log(**found, **{f"teacher_{name}": value for name, value in self.teacher.items()})
        for name, value in found.items():
            limit = max(self.tolerance, abs(self.untrained[name] - self.teacher[name]))
            outside = abs(value - self.teacher[name]) > limit
            if outside and not self._outside[name]:
                logger.warning(
                    f"Step {run.step}: the {name} of what the student draws has drifted to {value:.3f}, the teacher's"
                    f" is {self.teacher[name]:.3f} (`drift_tolerance` {self.tolerance:g}). Look at the validation"
                    " pictures; go back to an earlier checkpoint, lower `learning_rate`, or start again with a lower"
                    " `augmentation_scale`"
                )
            self._outside[name] = outside

    def _roll_out(self, velocity_of: Callable[[Text], Velocity], num_steps: int) -> torch.Tensor:
        """Draw latents in so many even steps, from the same noises in every process."""
        sigmas = shift_sigmas(torch.tensor([*even_sigmas(num_steps), 0.0]), self._shift)
        latents = []
        for noise, text in self._batches:
            last = torch.full((len(noise),), num_steps - 1)
            latents.append(record_rollout(velocity_of(text), noise, sigmas, last, text).pred_original_sample)
        return torch.cat(latents)


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    """The latent pixels, (pixels, channels), and a 1 beside each."""
    pixels = latents.movedim(1, -1).flatten(0, -2).cpu().double()
    return torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
