"""Features and scores of drawn pictures, kept beside them: a stopped measurement goes on, an equal one is read."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..files import written_beside
from .features import FeatureExtractor
from .picture_folder import PictureFolder, digest_weights
from .text_image import TextImageScorer


CHUNK = 256  # pictures that are computed before it is looked whether to save
SAVE_SECONDS = 60.0


def features_of(extractor: FeatureExtractor, pictures: Sequence[Image.Image]) -> Tensor:
    """Compute the features of pictures; those of a `PictureFolder` are kept in it.

    Args:
        extractor: makes them.
        pictures: N pictures.

    Returns:
        (N, D), on the CPU.
    """

    def compute(chosen: Sequence[int]) -> Tensor:
        return extractor.extract(pictures[index] for index in chosen)

    return kept_rows(pictures, type(extractor).__name__, digest_weights(extractor), compute)


def scores_of(scorer: TextImageScorer, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Score pictures against their prompts; those of a `PictureFolder` keep their scores in it.

    Args:
        scorer: gives the scores.
        pictures: N pictures.
        prompts: theirs, N texts.

    Returns:
        (N,), on the CPU.
    """

    def compute(chosen: Sequence[int]) -> Tensor:
        return scorer((pictures[index] for index in chosen), [prompts[index] for index in chosen])

    return kept_rows(pictures, scorer.name, scorer.digest, compute)


def kept_rows(
    pictures: Sequence[Image.Image], name: str, made_by: str, compute: Callable[[Sequence[int]], Tensor]
) -> Tensor:
    """Give numbers of every picture: those that were kept, and the others computed, and kept from then on.

    A picture that was drawn anew, which its file's size and time tell, is computed anew.

    Args:
        pictures: N; those of a `PictureFolder` have a folder in which numbers are kept, others have none.
        name: of the numbers, such as `"PickScore"`; that of their file comes from it.
        made_by: a digest of what computes them: what another one computed is not used.
        compute: gives float32 (n, ...) of n pictures, whose places it is given.

    Returns:
        (N, ...), on the CPU.
    """
    if not isinstance(pictures, PictureFolder):
        return compute(range(len(pictures)))
    file = pictures.folder / f"{re.sub(r'[^a-z0-9.]+', '_', name.lower())}.safetensors"
    stamps = [_stamp(pictures.path(index)) for index in range(len(pictures))]
    kept = _read(file, made_by)
    missing = [index for index, stamp in enumerate(stamps) if stamp not in kept]
    saved = time.monotonic()
    with tqdm(total=len(missing), desc=name, unit="picture", disable=not missing) as done:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            kept.update(zip((stamps[index] for index in chunk), compute(chunk).cpu(), strict=True))
            done.update(len(chunk))
            if time.monotonic() - saved >= SAVE_SECONDS or chunk[-1] == missing[-1]:
                _write(file, made_by, kept)
                saved = time.monotonic()
    return torch.stack([kept[stamp] for stamp in stamps])


def _stamp(path: Path) -> str:
    """A picture's file, known again as long as nobody writes it."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _read(file: Path, made_by: str) -> dict[str, Tensor]:
    """What was kept, by stamp; nothing where another network made it, or the file is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("made_by") != made_by:
                return {}
            return dict(zip(json.loads(metadata["pictures"]), opened.get_tensor("rows"), strict=True))
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}


def _write(file: Path, made_by: str, kept: dict[str, Tensor]) -> None:
    with written_beside(file) as partial:
        metadata = {"made_by": made_by, "pictures": json.dumps(list(kept))}
        save_file({"rows": torch.stack(list(kept.values())).contiguous()}, partial, metadata=metadata)
