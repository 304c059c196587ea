"""diffusers' verbs for LoRA, in a pipeline whose network is a student by its adapters."""

from __future__ import annotations

import os
from json import JSONDecodeError
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from diffusers.loaders import SanaLoraLoaderMixin
from safetensors import SafetensorError

from .backbones.sana import TEACHER_TIME_LAYER
from .scheduling_tbcm import DISTILLED_WITH, TBCMScheduler, check_distilled_with
from .student_adapters import (
    GUIDANCE_EMBEDDER_FILE,
    check_embedder,
    check_layers,
    check_unfused,
    follow_adapters,
    own_weights,
    students_of,
    take_students,
)


def drop_guidance_bias(
    layers: dict[str, torch.Tensor], metadata: dict[str, Any] | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Leave out what `save_lora` added for stock pipelines: a student embeds guidance itself.

    Args:
        layers: what `pytorch_lora_weights.safetensors` holds; anything else is given back as it is.
        metadata: the adapter's config in that file's header.

    Returns:
        The adapters without biases, and their config.
    """
    if f"transformer.{TEACHER_TIME_LAYER}.lora_B.bias" not in layers:
        return layers, metadata
    layers = {
        name: layer
        for name, layer in layers.items()
        if TEACHER_TIME_LAYER not in name and not name.endswith(".lora_B.bias")
    }
    if metadata is not None:
        targets = [name for name in metadata["transformer.target_modules"] if name != TEACHER_TIME_LAYER]
        metadata = {**metadata, "transformer.target_modules": targets, "transformer.lora_bias": False}
    return layers, metadata


class StudentLoraLoaderMixin(SanaLoraLoaderMixin):
    """diffusers' verbs for LoRA, after each of which the network embeds guidance as its adapters in effect do."""

    transformer: SanaTransformer2DModel
    scheduler: TBCMScheduler

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """
        Read LoRA layers, without the fixed guidance that a student distilled as LoRA holds for stock pipelines.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`), kwargs:
                As in [`~loaders.SanaLoraLoaderMixin.lora_state_dict`].

        Returns:
            `dict[str, torch.Tensor]`, or with `return_lora_metadata=True` a `tuple` of it and the adapter's config.
        """
        found = super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        if kwargs.get("return_lora_metadata"):
            return drop_guidance_bias(*found)
        return drop_guidance_bias(found, None)[0]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Load LoRA layers and, where one lies beside them, the guidance embedder of a student distilled as LoRA.

        With the latter the pipeline may hold the plain teacher: it goes on with a transformer of its own, made of the
        teacher's weights, and another pipeline with the same teacher stays as it is.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                Folder, file or Hub id, or the LoRA layers themselves.
            adapter_name (`str`, *optional*), hotswap (`bool`, defaults to `False`), kwargs:
                As in [`~loaders.SanaLoraLoaderMixin.load_lora_weights`].

        Raises:
            `ValueError`: if there is a guidance embedder to load and offloading is already enabled, or what is to be
                loaded is torn, or a student of another network.
        """
        source, before = pretrained_model_name_or_path_or_dict, self.transformer
        if adapter_name is not None and (not adapter_name or "." in adapter_name):
            raise ValueError(f"`adapter_name` is {adapter_name!r}, but has to be a name without a dot.")
        embedder, scheduler_config = self._read_guidance_embedder(source, **kwargs)
        if embedder is not None:
            check_embedder(before, embedder)
            check_layers(before, *self.lora_state_dict(source, **kwargs, return_lora_metadata=True))
            self.register_modules(transformer=take_students(before))
        known = {*getattr(self.transformer, "peft_config", ())}
        try:
            super().load_lora_weights(source, adapter_name, hotswap, **kwargs)
        except BaseException:
            self.register_modules(transformer=before)
            raise
        students = students_of(self.transformer)
        if students is not None:
            for name in {*getattr(self.transformer, "peft_config", ())} - known or {adapter_name}:
                students.embedders.pop(name, None)  # of what was hot-swapped
                students.scheduler_configs.pop(name, None)
                if embedder is not None:
                    students.embedders[name] = embedder
                    students.scheduler_configs[name] = scheduler_config
            students.weights = None
            follow_adapters(self.transformer)

    def _read_guidance_embedder(
        self, source: Any, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
        """What lies beside LoRA layers, and what it says of the scheduler; None where nothing lies there, as with a
        style for a student."""
        if isinstance(source, dict):
            return None, {}
        folder = os.path.dirname(os.path.abspath(source)) if os.path.isfile(source) else source
        where = {**kwargs, "weight_name": GUIDANCE_EMBEDDER_FILE, "use_safetensors": True}
        try:
            embedder, scheduler_config = self.lora_state_dict(folder, **where, return_lora_metadata=True)
        except OSError:
            return None, {}
        except (SafetensorError, JSONDecodeError) as error:
            raise ValueError(f"{GUIDANCE_EMBEDDER_FILE} of the LoRA is torn: {error}") from error
        if not isinstance(scheduler_config, dict | None):
            raise ValueError(f"the header of {GUIDANCE_EMBEDDER_FILE} holds {scheduler_config!r}, and no dict.")
        recorded = {name: value for name, value in (scheduler_config or {}).items() if name in DISTILLED_WITH}
        check_distilled_with(**recorded)
        return embedder, recorded

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Take all LoRA layers out, and the students' guidance embedders; what is fused into the weights stays."""
        super().unload_lora_weights(*args, **kwargs)
        follow_adapters(self.transformer)

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """Choose adapters and their weights; each student's guidance embedder has the weight of its adapter."""
        check_unfused(self.transformer)
        super().set_adapters(*args, **kwargs)
        follow_adapters(self.transformer)

    def enable_lora(self) -> None:
        """Switch the chosen adapters on, and the guidance embedder of a student among them."""
        super().enable_lora()
        follow_adapters(self.transformer)

    def disable_lora(self) -> None:
        """Switch all adapters off: what was a student's transformer is its teacher's again, and is not drawn with."""
        check_unfused(self.transformer)
        super().disable_lora()
        follow_adapters(self.transformer)

    def delete_adapters(self, *args: Any, **kwargs: Any) -> None:
        """Delete adapters, and the guidance embedders of the students among them."""
        check_unfused(self.transformer)
        super().delete_adapters(*args, **kwargs)
        follow_adapters(self.transformer)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into the weights, which become the pipeline's own where a teacher's pipeline has the same."""
        own_weights(self.transformer)
        super().fuse_lora(*args, **kwargs)
        follow_adapters(self.transformer)
        students = students_of(self.transformer)
        if students is not None:  # the adapters may go now, and the student stays
            self.scheduler.register_to_config(**students.scheduler_config)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Take merged adapters out of the weights again."""
        super().unfuse_lora(*args, **kwargs)
        follow_adapters(self.transformer)
