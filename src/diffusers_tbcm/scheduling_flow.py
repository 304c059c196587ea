"""The samplers of students that a flow-matching stock pipeline draws with: CDM's, and TBCM's that are no Sana.

CDM's takes Euler steps, evenly spaced before the shift. TBCM's predicts x_0 and noises it to the next time, in the
times of `TBCMScheduler`: x_t = cos t x_0 + sin t z is, times (1 - s) / (cos t sigma_data), x_s = (1 - s) x_0 + s e.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .call_arguments import real_number, whole_number
from .flow import add_flow_noise, flow_prediction
from .scheduling_tbcm import TBCMScheduler, check_distilled_with
from .trigflow import trig_to_flow_timestep


GUIDANCE_SCALE = 1.0  # a flow student has learned its teacher's guidance: its pipeline adds none
HIDDEN_CALL_OPTIONS = "_call_options"  # in a stock scheduler's config: by it a flow student's folder is known


class FlowStudentScheduler(FlowMatchEulerDiscreteScheduler):
    """
    Few steps of a student that its teacher's own stock pipeline draws with.

    A student of CDM (https://arxiv.org/abs/2605.06376) takes Euler steps `x_{s'} = x_s + (s' - s) v`, one of TBCM
    (https://arxiv.org/abs/2511.20410) with `stochastic_sampling` steps to `x_{s'} = (1 - s') x_0 + s' e` from its
    prediction `x_0 = x_s - s v`. Both are those of [`FlowMatchEulerDiscreteScheduler`] for the `sigmas` that
    `student_sigmas` gives, and that the stock scheduler has to be given: by itself it spaces N steps down to its
    smallest time. `LongCatImagePipeline` has to be given those of a student of TBCM: by itself it hands its scheduler
    even ones.

    Args:
        shift (`float`, defaults to `1.0`):
            The static shift k of times, s -> k s / (1 + (k - 1) s).
        call_options (`dict[str, Any]`, *optional*):
            What the student was distilled with, as arguments of its pipeline's call: `height`, `width`,
            `max_sequence_length`, `complex_human_instruction`, and 1 as `guidance_scale`.
        stochastic_sampling (`bool`, defaults to `False`):
            Whether it is a student of TBCM.

    Attributes:
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): source of the noise of steps; one for the
            batch or one per sample. The stock pipelines give theirs to the first noise only.

    Raises:
        `ValueError`: for a `shift` that is not positive, and for `call_options` that the call would refuse.
    """

    generator: torch.Generator | list[torch.Generator] | None = None

    @register_to_config
    def __init__(
        self, shift: float = 1.0, call_options: dict[str, Any] | None = None, stochastic_sampling: bool = False
    ):
        if not real_number("shift", shift) > 0:
            raise ValueError(f"`shift` is {shift}, but has to be positive.")
        check_distilled_with(call_options=call_options)
        guidance_scale = (call_options or {}).get("guidance_scale", GUIDANCE_SCALE)
        if guidance_scale != GUIDANCE_SCALE:
            raise ValueError(
                f"`call_options['guidance_scale']` is {guidance_scale}, but a flow student has learned its guidance:"
                f" its pipeline adds none at {GUIDANCE_SCALE}."
            )
        super().__init__(shift=shift, stochastic_sampling=stochastic_sampling)

    @property
    def default_call_options(self) -> dict[str, Any]:
        """
        What the student was distilled with, as arguments of its pipeline's call.

        Returns:
            `dict[str, Any]`: the config's `call_options`, and 1 as `guidance_scale`.
        """
        return {"guidance_scale": GUIDANCE_SCALE, **(self.config["call_options"] or {})}

    def to_stock(self) -> FlowMatchEulerDiscreteScheduler:
        """
        Make the [`FlowMatchEulerDiscreteScheduler`] that stands for this scheduler in a folder for plain diffusers.

        It keeps the call's options under a name with a leading underscore, of which diffusers does not warn.

        Returns:
            [`FlowMatchEulerDiscreteScheduler`]: `FlowStudentScheduler.from_config(stock.config)` is this scheduler.
        """
        stock = FlowMatchEulerDiscreteScheduler(
            shift=self.config["shift"], stochastic_sampling=self.config["stochastic_sampling"]
        )
        stock.register_to_config(**{HIDDEN_CALL_OPTIONS: self.config["call_options"] or {}})
        return stock

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Read a config as the stock method does, together with what `to_stock` has hidden in it."""
        entries = dict(config_dict)
        if HIDDEN_CALL_OPTIONS in entries:
            entries["call_options"] = entries.pop(HIDDEN_CALL_OPTIONS)
        return super().extract_init_dict(entries, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """
        Set the times to sample at; the number of steps alone is enough.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of model evaluations, at least 1.
            device (`str` or `torch.device`, *optional*):
                Where to put the times.
            sigmas (`list[float]`, *optional*), mu (`float`, *optional*), timesteps (`list[float]`, *optional*):
                As in the stock method. Default: `student_sigmas`.

        Raises:
            `ValueError`: for a number of steps that is none.
        """
        if sigmas is None and timesteps is None:
            sigmas = student_sigmas(num_inference_steps, stochastic_sampling=self.config["stochastic_sampling"])
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """
        Go to the next time; of a student of TBCM the noise is that of `generator`, and the last step draws none.

        Args:
            model_output (`torch.Tensor` of shape `(batch, ...)`):
                The velocity v.
            timestep (`float` or `torch.Tensor`):
                The current one of `timesteps`.
            sample (`torch.Tensor`, shaped as `model_output`):
                The noisy sample x_s.
            args, kwargs: as in the stock method, of no effect on a student of TBCM.
            return_dict (`bool`, defaults to `True`):
                Whether to return an output object instead of a tuple.

        Returns:
            [`~schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput`] or `tuple`: the
            sample at the next time, shaped as `sample`.
        """
        if not self.config["stochastic_sampling"]:
            return super().step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        if self.step_index is None:
            self._init_step_index(timestep)
        # Not the stock method's noise, which was that of no generator before diffusers 0.37
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        s, next_s = self.sigmas[self.step_index : self.step_index + 2]
        prev_sample = flow_prediction(wide, model_output, s)
        if self.step_index < len(self.sigmas) - 2:
            noise = randn_tensor(wide.shape, generator=self.generator, device=wide.device, dtype=wide.dtype)
            prev_sample = add_flow_noise(prev_sample, noise, next_s)
        self._step_index += 1
        prev_sample = prev_sample.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)


def student_sigmas(num_inference_steps: int | None, *, stochastic_sampling: bool = False) -> list[float]:
    """Give the times of a flow student's steps as a stock pipeline takes them, before the scheduler's shift.

    Args:
        num_inference_steps: N, at least 1.
        stochastic_sampling: whether it is a student of TBCM.

    Returns:
        `even_sigmas`; of a student of TBCM the angles of `TBCMScheduler`, as s.

    Raises:
        ValueError: for anything else.
    """
    if not stochastic_sampling:
        return even_sigmas(num_inference_steps)
    scheduler = TBCMScheduler()
    scheduler.set_timesteps(num_inference_steps)
    return trig_to_flow_timestep(scheduler.timesteps[:-1]).clamp(max=1).tolist()  # pi/2 is a little more in float32


def even_sigmas(num_inference_steps: int | None) -> list[float]:
    """Give the times of a flow student's steps as a stock pipeline takes them, before the scheduler's shift.

    Args:
        num_inference_steps: N, at least 1.

    Returns:
        1, 1 - 1/N, ..., 1/N.

    Raises:
        ValueError: for anything else.
    """
    steps = whole_number("num_inference_steps", num_inference_steps)
    return [1 - step / steps for step in range(steps)]


def is_matched(scheduler: SchedulerMixin) -> bool:
    """Say whether what a scheduler draws with is a student of CDM, and not of TBCM.

    Args:
        scheduler: of a student's pipeline.

    Returns:
        Whether it takes Euler steps at CDM's times.
    """
    return isinstance(scheduler, FlowStudentScheduler) and not scheduler.config["stochastic_sampling"]


def is_flow_student(scheduler_config: Mapping[str, Any]) -> bool:
    """Say whether a pipeline's student is drawn by its teacher's own class, and not a teacher itself.

    Args:
        scheduler_config: what the folder's scheduler_config.json holds.

    Returns:
        Whether `FlowStudentScheduler.to_stock` wrote it.
    """
    stock = FlowMatchEulerDiscreteScheduler.__name__
    return scheduler_config.get("_class_name") == stock and HIDDEN_CALL_OPTIONS in scheduler_config
