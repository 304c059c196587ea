"""Networks by family: what is a family's own, in one file each, under names that all families share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..files import read_json
from ..text import Text
from . import sana


class Backbone(Protocol):
    """What the file of a family has; `sana.py` says of each what it takes and gives.

    Attributes:
        TRANSFORMER_CLASS: diffusers' class of the network.
        PIPELINE_CLASS: the stock pipeline of a teacher.
        STUDENT_PIPELINE_CLASS: the stock pipeline that draws with a consistency student.
        COPIED_COMPONENTS: what a student takes over from its teacher's folder.
        INSTRUCTION: lines that the stock pipelines put before a prompt; None for none.
        LORA_TARGET_MODULES: the layers that LoRA adapts by default, by the ends of their names.
    """

    @property
    def TRANSFORMER_CLASS(self) -> Any: ...

    @property
    def PIPELINE_CLASS(self) -> Any: ...

    @property
    def STUDENT_PIPELINE_CLASS(self) -> Any: ...

    @property
    def COPIED_COMPONENTS(self) -> tuple[str, ...]: ...

    @property
    def INSTRUCTION(self) -> list[str] | None: ...

    @property
    def LORA_TARGET_MODULES(self) -> tuple[str, ...]: ...

    def load_transformer(self, folder: Path, variant: str | None = None) -> Any: ...

    def load_vae(self, folder: Path, variant: str | None = None) -> Any: ...

    def load_text_pipeline(self, folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any: ...

    def encode_prompt(
        self,
        pipeline: Any,
        prompt: str,
        *,
        max_sequence_length: int,
        instruction: list[str] | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor: ...

    def encode_pixels(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor: ...

    def decode_latents(self, vae: Any, latents: torch.Tensor) -> torch.Tensor: ...

    def vae_scale_factor(self, folder: Path) -> int: ...

    def latent_shape(self, folder: Path, transformer: Any, resolution: int | None) -> tuple[int, ...]: ...

    def native_resolution(self, folder: Path, transformer: Any) -> int: ...

    def blocks(self, transformer: Any) -> list[nn.Module]: ...

    def after_blocks(self, transformer: Any) -> nn.Module: ...

    def inner_dim(self, transformer: Any) -> int: ...

    def embeds_guidance(self, transformer: Any) -> bool: ...

    def share_prompts(self, transformer: Any) -> Any: ...

    def keep_text(self, transformer: Any) -> AbstractContextManager[None]: ...

    def velocity(
        self, transformer: Any, sample: torch.Tensor, time: torch.Tensor, text: Text, guidance: torch.Tensor | None
    ) -> torch.Tensor: ...

    def embed_time(self, transformer: Any, time: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor: ...

    def timestep_scale(self, transformer: Any) -> float: ...

    def name_timestep_scale(self, transformer: Any, scale: float) -> None: ...

    def infer_timestep_scale(self, transformer: Any, text: Text) -> float: ...

    def make_student(self, teacher: Any) -> Any: ...


FAMILIES: tuple[Backbone, ...] = (sana,)


def backbone_of(model: nn.Module | DiffusionPipeline) -> Backbone:
    """Say which family a network or pipeline belongs to.

    Args:
        model: a transformer in flow-matching form, or a teacher's stock pipeline.

    Returns:
        The family's file.

    Raises:
        ValueError: for a network of no family here.
    """
    for family in FAMILIES:
        if isinstance(model, family.TRANSFORMER_CLASS | family.PIPELINE_CLASS):
            return family
    raise ValueError(f"`model` is a {type(model).__name__}, and the families known are {_known()}.")


def find_backbone(folder: Path) -> Backbone:
    """Say which family a pipeline folder's transformer belongs to.

    Args:
        folder: with a model_index.json.

    Returns:
        The family's file.

    Raises:
        ValueError: for a transformer of no family here.
    """
    found = read_json(folder / "model_index.json").get("transformer")
    for family in FAMILIES:
        if found == ["diffusers", family.TRANSFORMER_CLASS.__name__]:
            return family
    raise ValueError(f"{str(folder)!r} is of no known family: its transformer is {found}, known are {_known()}")


def _known() -> str:
    return ", ".join(family.TRANSFORMER_CLASS.__name__ for family in FAMILIES)
