"""Networks by family: what is a family's own, in one file each, under names that all families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version
from torch import nn

from ..components import MODEL_INDEX
from ..files import read_json
from ..text import Text
from . import flux, sana, sd3


class Backbone(Protocol):
    """What the file of a family has; `sd3.py` says of each function what it takes and gives.

    A new family is such a file and its name in `FAMILIES`. It has to answer:

    - which stock classes it is: the network, its teacher's pipeline, and the folders that a student copies;
    - how prompts are read: `prompt_tokens`, `encode_prompt`, and `text_arguments`, which hand the result to the stock
      pipeline. A network without an attention mask gets the padding that its pipeline gives it as tokens;
    - where latents lie: `latent_shape`, `encode_pixels` and `decode_latents`, on unit scale as the network sees them,
      (batch, channels, height, width) whatever the network packs them to;
    - what the network computes: `velocity` is v = e - x_0 at s times `timestep_scale`, with the sign and the time of
      this package whatever the network's own are; `make_ready` changes the network for it, in place. Guidance is added
      outside, from both branches; `guidance_arguments` says how the stock pipeline is asked for it, and
      `RESCALE_GUIDED` what that does to its result;
    - how time gets in: `embed_time` and its parts, and `in_dense_time`, which consistency training wants;
    - how it is trained: `make_student`, `blocks`, which are checkpointed and compiled, and LoRA's layers.

    `tests/test_backbones.py` asks all of that of every family; a tiny pipeline of it goes into `tests/families.py`.

    Attributes:
        TRANSFORMER_CLASS: diffusers' class of the network.
        PIPELINE_CLASS: the stock pipeline of a teacher, and of a flow student.
        STUDENT_PIPELINE_CLASS: the stock pipeline that draws with a consistency student.
        STUDENT_EMBEDS_GUIDANCE: whether a consistency student takes the guidance scale as an input. One that does not
            learns one guidance, and is drawn by `PIPELINE_CLASS` with a `FlowStudentScheduler`.
        TAG: the family's name on the Hub.
        COPIED_COMPONENTS: what a student takes over from its teacher's folder.
        OPTIONAL_COMPONENTS: what it takes over where the teacher has it, and what drawing does not take.
        INSTRUCTION: lines that the stock pipelines put before a prompt; None for none.
        READING_OPTIONS: arguments of the stock pipeline's call that say how prompts are read.
        CALL_OPTIONS: what the call is always given.
        GUIDED_OPTIONS: what a guided call is given, so that it guides as training does.
        RESCALE_GUIDED: what the stock pipeline makes of the guided v, from that and the v of the prompt; None where it
            takes the guided v as it is.
        LORA_TARGET_MODULES: the layers that LoRA adapts by default, by the ends of their names.
        DENSE_TIME_SCALE: what s is multiplied by before a network in dense time sees it.
        TIME_EMBEDDER: the layers that embed a teacher's time, by their module path.
    """

    @property
    def TRANSFORMER_CLASS(self) -> Any: ...

    @property
    def PIPELINE_CLASS(self) -> Any: ...

    @property
    def STUDENT_PIPELINE_CLASS(self) -> Any: ...

    @property
    def STUDENT_EMBEDS_GUIDANCE(self) -> bool: ...

    @property
    def TAG(self) -> str: ...

    @property
    def COPIED_COMPONENTS(self) -> tuple[str, ...]: ...

    @property
    def OPTIONAL_COMPONENTS(self) -> tuple[str, ...]: ...

    @property
    def INSTRUCTION(self) -> list[str] | None: ...

    @property
    def READING_OPTIONS(self) -> tuple[str, ...]: ...

    @property
    def CALL_OPTIONS(self) -> Mapping[str, Any]: ...

    @property
    def GUIDED_OPTIONS(self) -> Mapping[str, Any]: ...

    @property
    def RESCALE_GUIDED(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None: ...

    @property
    def LORA_TARGET_MODULES(self) -> tuple[str, ...]: ...

    @property
    def DENSE_TIME_SCALE(self) -> float: ...

    @property
    def TIME_EMBEDDER(self) -> str: ...

    def load_transformer(self, folder: Path, variant: str | None = None) -> Any: ...

    def load_vae(self, folder: Path, variant: str | None = None) -> Any: ...

    def load_text_pipeline(self, folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any: ...

    def prompt_tokens(self, folder: Path, asked: int | None) -> int: ...

    def encode_prompt(
        self,
        pipeline: Any,
        prompt: str,
        *,
        max_sequence_length: int,
        instruction: list[str] | None = None,
        device: torch.device | str | None = None,
    ) -> Text: ...

    def text_arguments(self, text: Text) -> Mapping[str, Any]: ...

    def guidance_arguments(self, guidance_scale: float, prompts: int) -> Mapping[str, Any]: ...

    def make_pipeline(self, vae: Any, transformer: Any, scheduler: Any) -> Any: ...

    def encode_pixels(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor: ...

    def decode_latents(self, vae: Any, latents: torch.Tensor) -> torch.Tensor: ...

    def vae_scale_factor(self, folder: Path) -> int: ...

    def latent_shape(self, folder: Path, transformer: Any, resolution: int | None) -> tuple[int, ...]: ...

    def native_size(self, transformer: Any) -> int: ...

    def image_tokens(self, transformer: Any, shape: tuple[int, ...]) -> int: ...

    def blocks(self, transformer: Any) -> list[nn.Module]: ...

    def after_blocks(self, transformer: Any) -> nn.Module: ...

    def inner_dim(self, transformer: Any) -> int: ...

    def embeds_guidance(self, transformer: Any) -> bool: ...

    def make_ready(self, transformer: Any) -> Any: ...

    def keep_text(self, transformer: Any) -> AbstractContextManager[Callable[[Text], Text]]: ...

    def velocity(
        self, transformer: Any, sample: torch.Tensor, time: torch.Tensor, text: Text, guidance: torch.Tensor | None
    ) -> torch.Tensor: ...

    def embed_time(self, transformer: Any, time: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor: ...

    def time_features(self, transformer: Any, time: torch.Tensor) -> torch.Tensor: ...

    def modulation(self, transformer: Any, embedded: torch.Tensor) -> torch.Tensor: ...

    def timestep_scale(self, transformer: Any) -> float: ...

    def in_dense_time(self, transformer: Any, scale: float) -> bool: ...

    def name_timestep_scale(self, transformer: Any, scale: float) -> None: ...

    def infer_timestep_scale(self, transformer: Any, text: Text) -> float: ...

    def make_student(self, teacher: Any) -> Any: ...


FAMILIES: tuple[Backbone, ...] = (sana, sd3, flux)
# Networks that diffusers has from some version on. An older Qwen-Image attends to the padding of its prompts. Before
# 0.38 Z-Image's pads its text in place, which no dual number follows, and its pipeline takes guidance below 1 for
# none.
NEWER = {
    "LongCatImageTransformer2DModel": "0.37",
    "QwenImageTransformer2DModel": "0.37",
    "Flux2Transformer2DModel": "0.37",
    "ZImageTransformer2DModel": "0.38",
}


def _has(name: str) -> bool:
    return Version(diffusers.__version__) >= Version(NEWER[name])


if _has("LongCatImageTransformer2DModel"):
    from . import flux2_klein, longcat_image, qwen_image

    FAMILIES += (longcat_image, qwen_image, flux2_klein)

if _has("ZImageTransformer2DModel"):
    from . import z_image

    FAMILIES += (z_image,)


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
        ValueError: for a transformer of no family here, or of one that the installed diffusers has not.
    """
    return backbone_of_index(read_json(folder / MODEL_INDEX), str(folder))


def backbone_of_index(model_index: Mapping[str, Any], pipeline: str) -> Backbone:
    """Say which family a pipeline's transformer belongs to.

    Args:
        model_index: what its model_index.json holds.
        pipeline: what messages call it.

    Returns:
        The family's file.

    Raises:
        ValueError: as of `find_backbone`.
    """
    found = model_index.get("transformer")
    for family in FAMILIES:
        if found == ["diffusers", family.TRANSFORMER_CLASS.__name__]:
            return family
    for name, version in NEWER.items():
        if found == ["diffusers", name]:
            raise ValueError(
                f"{pipeline!r} has a {name}: that needs diffusers {version} or newer, and {diffusers.__version__} is"
                " installed"
            )
    raise ValueError(f"{pipeline!r} is of no known family: its transformer is {found}, known are {_known()}")


def backbone_of_pipeline(name: str) -> Backbone:
    """Say which family a stock pipeline belongs to.

    Args:
        name: of its class.

    Returns:
        The family's file.

    Raises:
        ValueError: for a pipeline of no family here.
    """
    for family in FAMILIES:
        if name == family.PIPELINE_CLASS.__name__:
            return family
    known = ", ".join(family.PIPELINE_CLASS.__name__ for family in FAMILIES)
    raise ValueError(f"`name` is {name!r}, and the pipelines known are {known}.")


def text_components(backbone: Backbone) -> tuple[str, ...]:
    """Name what of a pipeline reads and embeds its prompts: tokenizers and text encoders."""
    return tuple(name for name in backbone.COPIED_COMPONENTS if name != "vae")


def _known() -> str:
    return ", ".join(family.TRANSFORMER_CLASS.__name__ for family in FAMILIES)
