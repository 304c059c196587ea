"""The sampler of a TBCM student: consistency-model steps in TrigFlow time (arXiv 2511.20410)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_scm import SCMScheduler, SCMSchedulerOutput

from .call_arguments import check_flags, check_instruction, real_number, whole_number


MAX_TIMESTEP = math.pi / 2  # pure noise
MAX_TIMESTEP_FLOAT32 = torch.tensor(MAX_TIMESTEP, dtype=torch.float32).item()  # as schedules hold it, 4e-8 more
STOCK_MAX_TIMESTEP = 1.57080  # pi / 2 rounded up, where cos < 0: the default of diffusers' Sana-Sprint pipeline

# What `set_timesteps(n)` gives unless a checkpoint's config says otherwise. The two-step angle is the one that the
# paper's authors validate with; the others divide the quarter circle evenly, as every number of steps not named does.
TIMESTEPS_BY_STEPS = {
    "1": [MAX_TIMESTEP, 0.0],
    "2": [MAX_TIMESTEP, 1.0, 0.0],
    "4": [MAX_TIMESTEP, 3 * math.pi / 8, math.pi / 4, math.pi / 8, 0.0],
}
# What an SCMScheduler does not know
OWN_CONFIG_ENTRIES = ("timesteps_by_steps", "guidance_scales", "call_options", "stochastic_sampling")
DISTILLED_WITH = ("guidance_scales", "call_options")  # those that a student's LoRA carries too
CALL_OPTIONS = ("guidance_scale", "height", "width", "max_sequence_length", "complex_human_instruction")


class TBCMScheduler(SCMScheduler):
    """
    Multistep consistency sampling in TrigFlow time for students distilled with TBCM (https://arxiv.org/abs/2511.20410).

    With `t` an angle in radians, pi/2 being pure noise and 0 a clean sample, every step predicts the clean sample
    `x_0 = cos(t) x_t - sin(t) model_output` and, except in the last one, noises it again to the next angle:
    `x_t' = cos(t') x_0 + sin(t') z` with `z ~ N(0, sigma_data^2)`. With such fresh noise, same timesteps and seed give
    bit for bit the samples of [`SCMScheduler`], whose configs load here and which loads the configs saved here.

    Args:
        num_train_timesteps (`int`, defaults to `1000`):
            The largest number of inference steps.
        prediction_type (`str`, defaults to `"trigflow"`):
            What the model predicts; `"trigflow"` is the only choice.
        sigma_data (`float`, defaults to `0.5`):
            Standard deviation of the samples, and so of the noise that is added to them.
        timesteps_by_steps (`dict[str, list[float]]`, *optional*):
            The timesteps that `set_timesteps(n)` gives, in radians, by the decimal `n` (a string, as JSON keys are).
            Defaults to `TIMESTEPS_BY_STEPS`; saved in the config, so that a checkpoint carries its own.
        guidance_scales (`list[float]`, *optional*):
            The guidance scales that the student was distilled at. Sampling does not depend on them: a checkpoint
            carries them so that its pipeline draws at the middle one by default and warns of a scale beyond them.
        call_options (`dict[str, Any]`, *optional*):
            What else the student was distilled with, as arguments of its pipeline's call, such as
            `max_sequence_length`. A checkpoint carries them as its pipeline's defaults.
        stochastic_sampling (`bool`, defaults to `True`):
            Whether z is fresh noise, as in the paper. Without it z is the noise that the model has predicted,
            `sin(t) x_t + cos(t) model_output`, and the first noise alone decides the picture: the step is
            `x_t' = cos(t - t') x_t - sin(t - t') model_output`, that of DDIM.

    Raises:
        `ValueError`: for another `prediction_type`, a `sigma_data` that is not positive, timesteps that
            `set_timesteps` would refuse, a `stochastic_sampling` that is no bool, and as `check_distilled_with`.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "trigflow",
        sigma_data: float = 0.5,
        timesteps_by_steps: dict[str, list[float]] | None = None,
        guidance_scales: list[float] | None = None,
        call_options: dict[str, Any] | None = None,
        stochastic_sampling: bool = True,
    ):
        if prediction_type != "trigflow":
            raise ValueError(f"`prediction_type` is {prediction_type!r}, but TBCM students predict 'trigflow' only.")
        if not real_number("sigma_data", sigma_data) > 0:
            raise ValueError(f"`sigma_data` is {sigma_data}, but a standard deviation has to be positive.")
        whole_number("num_train_timesteps", num_train_timesteps)
        check_flags(stochastic_sampling=stochastic_sampling)
        if timesteps_by_steps is None:
            timesteps_by_steps = TIMESTEPS_BY_STEPS
        if not isinstance(timesteps_by_steps, Mapping):
            raise ValueError(f"`timesteps_by_steps` is {timesteps_by_steps!r}, but has to be a dict, or None.")
        for steps, timesteps in timesteps_by_steps.items():
            checked = _check_timesteps(timesteps, name=f"timesteps_by_steps[{steps!r}]")
            if steps != str(len(checked) - 1):
                raise ValueError(
                    f"`timesteps_by_steps[{steps!r}]` has {len(checked)} timesteps; its key has to be the string"
                    f" {str(len(checked) - 1)!r}, one less, because the last timestep is the 0 where sampling ends."
                )
        check_distilled_with(guidance_scales, call_options)

        super().__init__(num_train_timesteps, prediction_type, sigma_data)
        self.register_to_config(timesteps_by_steps=timesteps_by_steps)

    @property
    def default_call_options(self) -> dict[str, Any]:
        """
        What the student was distilled with, as arguments of its pipeline's call.

        Returns:
            `dict[str, Any]`: the config's `call_options` and, where it knows them, the middle one of the
            `guidance_scales` as `guidance_scale`.
        """
        return recorded_call_options(self.config)

    def to_stock(self) -> SCMScheduler:
        """
        Make the [`SCMScheduler`] that stands for this scheduler in a checkpoint which loads without this package.

        It carries the config entries that it does not know under names with a leading underscore: those it keeps and
        saves, but does not warn of.

        Returns:
            [`SCMScheduler`]: of the same `sigma_data`; `TBCMScheduler.from_config(stock.config)` is this scheduler.
        """
        stock = SCMScheduler(
            self.config["num_train_timesteps"], self.config["prediction_type"], self.config["sigma_data"]
        )
        stock.register_to_config(**{f"_{name}": self.config[name] for name in OWN_CONFIG_ENTRIES})
        return stock

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """
        Read a config as the stock method does, together with the entries that `to_stock` has hidden in it.

        That of a teacher's flow scheduler says `stochastic_sampling` of its own steps, and not of these.
        """
        entries = dict(config_dict)
        if entries.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__:
            entries.pop("stochastic_sampling", None)
        for name in OWN_CONFIG_ENTRIES:
            if f"_{name}" in entries:
                entries[name] = entries.pop(f"_{name}")
        return super().extract_init_dict(entries, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        device: str | torch.device | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
    ) -> None:
        """
        Set the angles to sample at; the number of steps alone is enough.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of model evaluations, at least 1. May be left out where `timesteps` is given.
            timesteps (`list[float]` or `torch.Tensor` of shape `(num_inference_steps + 1,)`, *optional*):
                Angles in radians, strictly descending from at most pi/2 to exactly 0. Default: the config's
                `timesteps_by_steps` where it names this number of steps, otherwise even steps from pi/2 to 0.
            device (`str` or `torch.device`, *optional*):
                Where to put the timesteps.
            max_timesteps (`float`, *optional*):
                First angle in radians, of even steps down to 0. 1.57080, the stock pipeline's default, means pi/2.
            intermediate_timesteps (`float`, *optional*):
                The angle between `max_timesteps` and 0, for two steps only. Without effect where `timesteps` is given.

        Raises:
            `ValueError`: naming the argument that is missing, out of range or at odds with another.
        """
        if timesteps is not None:
            if max_timesteps is not None:
                raise ValueError(f"`max_timesteps` is {max_timesteps}, but `timesteps` is given too; pass only one.")
            schedule = _check_timesteps(timesteps, name="timesteps")
            if num_inference_steps is not None and whole_number("num_inference_steps", num_inference_steps) != (
                len(schedule) - 1
            ):
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}, but `timesteps` holds {len(schedule) - 1} steps"
                    " and the final 0; leave `num_inference_steps` out or make it agree."
                )
        else:
            steps = whole_number("num_inference_steps", num_inference_steps)
            schedule = self._default_timesteps(steps, device, max_timesteps, intermediate_timesteps)
        if device is not None and schedule.device.type == "cpu":
            # Filled in on the device: a copy from the host would wait until the device has done all it has to do.
            schedule = torch.stack([torch.full((), angle, device=device) for angle in schedule.tolist()])

        super().set_timesteps(
            len(schedule) - 1, timesteps=schedule, device=device, max_timesteps=None, intermediate_timesteps=None
        )

    def _default_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None,
        max_timesteps: float | None,
        intermediate_timesteps: float | None,
    ) -> torch.Tensor:
        named = self.config["timesteps_by_steps"].get(str(num_inference_steps))
        if max_timesteps is None and intermediate_timesteps is None and named is not None:
            return torch.tensor(named, dtype=torch.float32)

        first = MAX_TIMESTEP if max_timesteps is None else real_number("max_timesteps", max_timesteps)
        first = MAX_TIMESTEP if first == STOCK_MAX_TIMESTEP else first
        if not 0 < first <= MAX_TIMESTEP_FLOAT32:
            raise ValueError(f"`max_timesteps` is {max_timesteps}, but has to lie in (0, pi/2], in radians.")
        if intermediate_timesteps is None:
            return torch.linspace(first, 0, num_inference_steps + 1, device=device, dtype=torch.float32)

        if num_inference_steps != 2:
            raise ValueError(
                f"`intermediate_timesteps` is {intermediate_timesteps}, but `num_inference_steps` is"
                f" {num_inference_steps} and not 2; pass `timesteps` to choose every angle."
            )
        intermediate_timesteps = real_number("intermediate_timesteps", intermediate_timesteps)
        if not 0 < intermediate_timesteps < first:
            raise ValueError(
                f"`intermediate_timesteps` is {intermediate_timesteps}, but has to lie between 0 and {first} radians."
            )
        return torch.tensor([first, intermediate_timesteps, 0], dtype=torch.float32)

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """
        Find where a timestep stands in the schedule.

        Args:
            timestep (`float` or `torch.Tensor`):
                Angle in radians; a batch has to hold one and the same.
            schedule_timesteps (`torch.Tensor`, *optional*):
                The angles to search. Defaults to `self.timesteps`.

        Returns:
            `int`: its index.

        Raises:
            `ValueError`: if the schedule does not hold the timestep, or the batch holds several.
        """
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        value = torch.as_tensor(timestep, dtype=schedule.dtype, device=schedule.device).reshape(-1, 1)
        indices = (schedule == value).all(dim=0).nonzero()
        if len(indices) == 0:
            raise ValueError(f"`timestep` is {timestep}, but has to be one of `timesteps`: {schedule.tolist()}.")
        return int(indices[0])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SCMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Predict the clean sample and noise it to the next timestep; the last step leaves it clean.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`):
                The model's TrigFlow output F times `sigma_data`.
            timestep (`float` or `torch.Tensor` of shape `(batch,)`):
                The current angle in radians, looked up at the first step after `set_timesteps` and counted from there.
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`):
                The noisy sample x_t, of standard deviation `sigma_data`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the fresh noise, one for the batch or one per sample. The last step draws none, nor does any
                without `stochastic_sampling`.
            return_dict (`bool`, defaults to `True`):
                Whether to return an output object instead of a tuple.

        Returns:
            [`~schedulers.scheduling_scm.SCMSchedulerOutput`] or `tuple`: `prev_sample` (at the next timestep) and
            `pred_original_sample` (the predicted x_0), shaped as `sample`.

        Raises:
            `ValueError`: before `set_timesteps`, after the last step, or for a timestep that the schedule lacks.
        """
        if self.num_inference_steps is None:
            raise ValueError("`scheduler.timesteps` is not set; call `set_timesteps` before `step`.")
        if self.step_index is None:
            self._init_step_index(timestep)
        if not self.step_index < self.num_inference_steps:
            raise ValueError(
                f"`timestep` is {timestep}, but all {self.num_inference_steps} steps are done; call `set_timesteps`."
            )
        if self.config["stochastic_sampling"] and self.step_index < self.num_inference_steps - 1:
            return super().step(model_output, timestep, sample, generator, return_dict)

        angle, next_angle = self.timesteps[self.step_index : self.step_index + 2]
        pred_original_sample, prev_sample = (
            torch.cos(turn) * sample - torch.sin(turn) * model_output for turn in (angle, angle - next_angle)
        )
        self._step_index += 1
        if not return_dict:
            return prev_sample, pred_original_sample
        return SCMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Noise clean samples to the given angles: `cos(t) x_0 + sin(t) sigma_data noise`.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, ...)`):
                Clean samples x_0, of standard deviation `sigma_data`.
            noise (`torch.Tensor`, shaped as `original_samples`):
                Standard normal noise; it is scaled by `sigma_data` here.
            timesteps (`torch.Tensor` of shape `(batch,)` or `(1,)`):
                Angles in radians.

        Returns:
            `torch.Tensor`: the noisy samples x_t, with the shape and dtype of `original_samples`.

        Raises:
            `ValueError`: if an angle lies outside [0, pi/2].
        """
        if not ((timesteps >= 0) & (timesteps <= MAX_TIMESTEP_FLOAT32)).all():
            raise ValueError(f"`timesteps` is {timesteps.tolist()}, but has to lie in [0, pi/2], in radians.")
        angle = timesteps.to(original_samples.device).reshape(-1, *[1] * (original_samples.ndim - 1))
        noisy = torch.cos(angle) * original_samples + torch.sin(angle) * (self.config["sigma_data"] * noise)
        return noisy.to(original_samples.dtype)


def check_distilled_with(guidance_scales: Any = None, call_options: Any = None) -> None:
    """
    Refuse records of a student's training that its pipeline's call would refuse, or draw nonsense with.

    Args:
        guidance_scales (`list[float]`, *optional*), call_options (`dict[str, Any]`, *optional*):
            As [`TBCMScheduler`] takes them.

    Raises:
        `ValueError`: for guidance scales that are not positive, a name in `call_options` that is none of
            `CALL_OPTIONS`, or a value there that the call does not take.
    """
    if guidance_scales is not None and not (
        isinstance(guidance_scales, list | tuple)
        and guidance_scales
        and min(real_number("guidance_scales", scale) for scale in guidance_scales) > 0
    ):
        raise ValueError(f"`guidance_scales` is {guidance_scales}, but has to hold positive scales, or be None.")
    if call_options is None:
        return
    if not isinstance(call_options, Mapping) or not {*call_options} <= {*CALL_OPTIONS}:
        raise ValueError(f"`call_options` is {call_options}, but has to be a dict of {', '.join(CALL_OPTIONS)}.")
    for name, value in call_options.items():
        if name == "complex_human_instruction":
            check_instruction(value)
        elif name != "guidance_scale":
            whole_number(f"call_options[{name!r}]", value)
        elif not real_number(f"call_options[{name!r}]", value) > 0:
            raise ValueError(f"`call_options[{name!r}]` is {value}, but a guidance scale has to be positive.")


def recorded_call_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Read `default_call_options` from a scheduler's config.

    Args:
        config (`Mapping[str, Any]`):
            That of a [`TBCMScheduler`], or any other, which carries none.

    Returns:
        `dict[str, Any]`: arguments of the pipeline's call by name.
    """
    scales = config.get("guidance_scales")
    middle = {} if scales is None else {"guidance_scale": median_low(scales)}
    return {**middle, **(config.get("call_options") or {})}


def _check_timesteps(timesteps: Sequence[float] | torch.Tensor, name: str) -> torch.Tensor:
    """Turn angles into the float32 schedule that they describe, or say what is wrong with them."""
    schedule = as_schedule(timesteps)
    if schedule is None:
        raise ValueError(
            f"`{name}` is {timesteps}, but has to be two or more angles in radians, strictly descending from"
            f" at most pi/2 = {MAX_TIMESTEP} to a final 0."
        )
    return schedule


def as_schedule(timesteps: Sequence[float] | torch.Tensor) -> torch.Tensor | None:
    """
    Turn angles into the float32 schedule that they describe.

    Args:
        timesteps (`list[float]` or `torch.Tensor` of shape `(num_inference_steps + 1,)`):
            Angles in radians.

    Returns:
        `torch.Tensor`: the schedule; `None` where they do not strictly descend, in float32, from at most pi/2 to 0.
    """
    try:
        schedule = torch.as_tensor(timesteps, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):  # no numbers at all
        return None
    descending = schedule.ndim == 1 and len(schedule) > 1 and bool((schedule[:-1] > schedule[1:]).all())
    return schedule if descending and schedule[0] <= MAX_TIMESTEP_FLOAT32 and schedule[-1] == 0 else None
