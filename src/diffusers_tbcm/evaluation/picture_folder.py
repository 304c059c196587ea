"""Pictures drawn to be measured, on disk by prompt: a stopped run goes on, and several processes share it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any, overload

from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..draws import draw_generator
from ..files import read_json, write_json, written_beside
from .drawing import draw_pictures


SETTINGS = "settings.json"
WEIGHT_SAMPLE = 256  # values of every tensor that tell weights apart: any training step changes all of them


class PictureFolder(Sequence[Image.Image]):
    """The pictures of one model at one number of steps: several of every prompt, in that order, opened when asked for.

    Args:
        folder: where they are; made where there is none.
        prompts: P texts.
        pictures_per_prompt: M; a folder takes more of every prompt later.
        settings: what a picture depends on beside its prompt, JSON values by name.

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
        settings = {**settings, "prompts": text_digest(json.dumps(list(prompts)))}
        if (self.folder / SETTINGS).is_file():
            found = read_json(self.folder / SETTINGS)
            differences = [
                f"{name} is {found.get(name)!r} there and {settings.get(name)!r} here"
                for name in sorted({*found, *settings})
                if found.get(name) != settings.get(name)
            ]
            if differences:
                raise ValueError(
                    f"{str(folder)!r} holds pictures of another run: {'; '.join(differences)}. Choose another folder,"
                    " or delete this one to draw anew"
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"{str(folder)!r} holds files, and no {SETTINGS} that says of what: choose an empty or a new folder"
            )
        else:
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
        with Image.open(self.path(index)) as picture:
            return picture.convert("RGB")

    def path(self, index: int) -> Path:
        """Name a picture by its prompt's number and its own.

        Args:
            index: of the picture, 0 to P * M - 1.

        Returns:
            Its file.
        """
        prompt, picture = divmod(index, self.pictures_per_prompt)
        return self.folder / f"{prompt:06}-{picture:02}.png"

    def missing(self) -> list[int]:
        """Say which pictures are yet to be drawn.

        Returns:
            Their indices.
        """
        names = {path.name for path in self.folder.glob("*.png")}
        return [index for index in range(len(self)) if self.path(index).name not in names]

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
        """
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
        pipeline: any Sana pipeline, its LoRA loaded.

    Returns:
        A short text by component: two pipelines are equal where they would draw alike.
    """
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    digests = {"scheduler": text_digest(json.dumps(config, sort_keys=True, default=str))}
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            digest = blake2b(digest_size=8)
            for key, value in component.state_dict().items():
                sample = value.flatten()[:WEIGHT_SAMPLE].float().cpu().numpy()
                digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode() + sample.tobytes())
            digests[name] = digest.hexdigest()
    return digests


def text_digest(text: str) -> str:
    """Shorten a text to what tells it from others.

    Args:
        text: any.

    Returns:
        16 hexadecimal digits.
    """
    return blake2b(text.encode(), digest_size=8).hexdigest()
