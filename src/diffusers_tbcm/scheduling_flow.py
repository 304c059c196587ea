"""The sampler of a flow student, such as CDM's: Euler steps in rectified-flow time, evenly spaced before the shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from .call_arguments import real_number, whole_number
from .scheduling_tbcm import check_distilled_with


GUIDANCE_SCALE = 1.0  # a flow student has learned its teacher's guidance: its pipeline adds none
HIDDEN_CALL_OPTIONS = "_call_options"  # in a stock scheduler's config: by it a flow student's folder is known


class FlowStudentScheduler(FlowMatchEulerDiscreteScheduler):
    """
    Euler steps `x_{s'} = x_s + (s' - s) v` for students distilled with CDM (https://arxiv.org/abs/2605.06376).

    The steps are those of [`FlowMatchEulerDiscreteScheduler`] for the `sigmas` 1, 1 - 1/N, ..., 1/N, which the stock
    scheduler has to be given: by itself it spaces N steps down to its smallest time.

    Args:
        shift (`float`, defaults to `1.0`):
            The static shift k of times, s -> k s / (1 + (k - 1) s).
        call_options (`dict[str, Any]`, *optional*):
            What the student was distilled with, as arguments of its pipeline's call: `height`, `width`,
            `max_sequence_length`, `complex_human_instruction`, and 1 as `guidance_scale`.

    Raises:
        `ValueError`: for a `shift` that is not positive, and for `call_options` that the call would refuse.
    """

    @register_to_config
    def __init__(self, shift: float = 1.0, call_options: dict[str, Any] | None = None):
        if not real_number("shift", shift) > 0:
            raise ValueError(f"`shift` is {shift}, but has to be positive.")
        check_distilled_with(call_options=call_options)
        guidance_scale = (call_options or {}).get("guidance_scale", GUIDANCE_SCALE)
        if guidance_scale != GUIDANCE_SCALE:
            raise ValueError(
                f"`call_options['guidance_scale']` is {guidance_scale}, but a flow student has learned its guidance:"
                f" its pipeline adds none at {GUIDANCE_SCALE}."
            )
        super().__init__(shift=shift)

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
        stock = FlowMatchEulerDiscreteScheduler(shift=self.config["shift"])
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
                As in the stock method. Default: `even_sigmas`.

        Raises:
            `ValueError`: for a number of steps that is none.
        """
        if sigmas is None and timesteps is None:
            sigmas = even_sigmas(num_inference_steps)
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)


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


def is_flow_student(scheduler_config: Mapping[str, Any]) -> bool:
    """Say whether a pipeline's student is drawn by its teacher's own class, and not a teacher itself.

    Args:
        scheduler_config: what the folder's scheduler_config.json holds.

    Returns:
        Whether `FlowStudentScheduler.to_stock` wrote it.
    """
    stock = FlowMatchEulerDiscreteScheduler.__name__
    return scheduler_config.get("_class_name") == stock and HIDDEN_CALL_OPTIONS in scheduler_config
