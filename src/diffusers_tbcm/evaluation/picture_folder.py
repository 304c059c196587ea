"""Pictures drawn to be measured, on disk by prompt: a stopped run goes on, and several processes share it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any, overload

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..backbones.loading import check_prompt_pipeline
from ..digests import digest_text
from ..draws import draw_generator
from ..files import PARTIAL_SUFFIX, read_json, write_json, written_beside
from ..images import to_rgb
from ..pipeline_folder import TOKENIZER
from ..scheduling_tbcm import TBCMScheduler
from .drawing import draw_pictures


logger = logging.get_logger(__name__)

SETTINGS = "settings.json"
FILE_NAMES = "[0-9]" * 6 + "-[0-9][0-9].png"
WEIGHT_SAMPLE = 256  # values of every tensor that tell weights apart: any training step changes all of them


class PictureFolder(Sequence[Image.Image]):
    """The pictures of one model at one number of steps: several of every prompt, in that order, opened when asked for.

    Args:
        folder: where they are; made where there is none.
        prompts: P texts.
        pictures_per_prompt: M; a folder takes more of every prompt later.
        settings: what a picture depends on beside its prompt, JSON values by name.

    Attributes:
        settings: those, and a digest of the prompts.

    Raises:
        ValueError: where the folder holds pictures of other settings or prompts, or files of another's; the message
            says which differ.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        prompts: Sequence[str],
        pictures_per_prompt: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder = Path(folder)
        self.prompts = prompts
        self.pictures_per_prompt = pictures_per_prompt
        self.settings = settings = {**settings, "prompts": digest_text(json.dumps(list(prompts)))}
        found = read_json(self.folder / SETTINGS) if (self.folder / SETTINGS).is_file() else {}
        held = [path for path in self.folder.glob("*") if not path.name.endswith(PARTIAL_SUFFIX)]
        if held and not found:
            raise ValueError(
                f"{str(folder)!r} holds files, and no {SETTINGS} that says of what: choose an empty or a new folder"
            )
        differences = [
            f"{name} is {found.get(name)!r} there and {settings.get(name)!r} here"
            for name in sorted({*found, *settings})
            if found.get(name) != settings.get(name)
        ]
        if differences and any(self.folder.glob(FILE_NAMES)):  # settings that no picture came of bind nobody
            raise ValueError(
                f"{str(folder)!r} holds pictures of another run: {'; '.join(differences)}. Choose another folder,"
                " or delete this one to draw anew"
            )
        if found != settings:
            write_json(self.folder / SETTINGS, settings)

    def __len__(self) -> int:
        return len(self.prompts) * self.pictures_per_prompt

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            with Image.open(self.path(index)) as picture:
                return to_rgb(picture)
        except Exception as error:  # Pillow has one for every way in which a file can be broken
            raise ValueError(f"picture {str(self.path(index))!r} cannot be read: {error}") from error

    def path(self, index: int) -> Path:
        """Name a picture by its prompt's number and its own.

        Args:
            index: of the picture, 0 to P * M - 1.

        Returns:
            Its file.
        """
        prompt, picture = divmod(index, self.pictures_per_prompt)
        return self.folder / f"{prompt:06}-{picture:02}.png"

    def drawn_at(self, index: int) -> int:
        """Say when a picture was drawn.

        Args:
            index: of the picture.

        Returns:
            Nanoseconds, as file systems have them.
        """
        return self.path(index).stat().st_mtime_ns

    def place(self, index: int, target: Path) -> None:
        """Put a picture's file at another path, too: as a link where the disk has such, else as a copy.

        Args:
            index: of the picture.
            target: the path, in a folder that is there; a file there is replaced.
        """
        if target.exists() and target.samefile(self.path(index)):
            return
        with written_beside(target) as partial:
            try:
                os.link(self.path(index), partial)
            except OSError:
                shutil.copyfile(self.path(index), partial)

    def missing(self) -> list[int]:
        """Say which pictures are yet to be drawn; files that are not whole are named and count among them.

        Returns:
            Their indices.
        """
        names = {path.name for path in self.folder.glob("*.png")}
        torn = {name for name in names if not _is_whole(self.folder / name)}
        if torn:
            logger.warning(f"{len(torn)} pictures of {str(self.folder)!r} are torn and drawn again: {min(torn)}, ...")
        return [index for index in range(len(self)) if self.path(index).name not in names - torn]

    def draw(
        self,
        pipeline: DiffusionPipeline,
        indices: Sequence[int],
        *,
        num_inference_steps: int,
        seed: int,
        batch_size: int,
        progress: bool = True,
        **options: Any,
    ) -> None:
        """Draw pictures, each from noise that depends on the seed and on its own place alone.

        Args:
            pipeline: any Sana pipeline.
            indices: which pictures.
            num_inference_steps: steps to take.
            seed: of all pictures.
            batch_size: pictures at a time; another batch size gives the same pictures, to rounding.
            progress: show a bar.
            options: further arguments of the pipeline's call, such as `guidance_scale`.

        Raises:
            ValueError: where the pipeline's tokenizer reads no prompt.
        """
        check_prompt_pipeline(pipeline)
        places = [divmod(index, self.pictures_per_prompt) for index in indices]
        pictures = draw_pictures(
            pipeline,
            [self.prompts[prompt] for prompt, _ in places],
            (draw_generator(prompt, seed, stream=picture) for prompt, picture in places),
            num_inference_steps=num_inference_steps,
            batch_size=batch_size,
            **options,
        )
        with tqdm(total=len(indices), desc=self.folder.name, unit="picture", disable=not progress) as done:
            for index, picture in zip(indices, pictures, strict=True):
                with written_beside(self.path(index)) as partial:
                    picture.save(partial, format="PNG")
                done.update()


def pipeline_digests(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Say which pipeline this is, whatever its folder is called: a value for each component that changes pictures.

    Args:
        pipeline: of a known family, its LoRA loaded.

    Returns:
        A short text by component, the tokenizer's among them: two pipelines are equal where they would draw alike.
    """
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    if isinstance(pipeline.scheduler, TBCMScheduler) and config["stochastic_sampling"]:
        del config["stochastic_sampling"]  # earlier versions knew nothing else, and their folders do not name it
    digests = {"scheduler": digest_text(json.dumps(config, sort_keys=True, default=str))}
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            digests[name] = digest_weights(component)
        elif name.startswith(TOKENIZER) and component is not None:
            digests[name] = digest_text(_tokenizer_content(component))
    return digests


def digest_weights(*networks: nn.Module) -> str:
    """Say which weights these are, by some values of every tensor.

    Args:
        networks: any.

    Returns:
        16 hexadecimal digits, which a training step changes.
    """
    digest = blake2b(digest_size=8)
    for network in networks:
        for key, value in network.state_dict().items():
            sample = value.flatten()[:WEIGHT_SAMPLE].float().cpu().numpy()
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()


def _tokenizer_content(tokenizer: Any) -> str:
    """What a tokenizer knows; how it pads and cuts is the pipeline's to say."""
    if not tokenizer.is_fast:
        return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: content[name] for name in ("added_tokens", "normalizer", "model")}, sort_keys=True)


def _is_whole(path: Path) -> bool:
    """Whether a PNG file is what was written: its checksums tell, without decoding it."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except Exception:  # Pillow has one for every way in which a file can be broken
        return False
    return True
