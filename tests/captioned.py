"""A folder of captioned pictures, as `datasets` reads it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


RESOLUTION = 16  # pixels of a picture's width


def write_images(folder: Path, captions: list) -> Path:
    """Write random pictures, each three pixels higher than the one before, and give the folder back.

    Args:
        folder: where to write; must not be there.
        captions: a picture's text, or list of texts.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for index, caption in enumerate(captions):
        pixels = generator.integers(0, 256, (RESOLUTION + 3 * index, RESOLUTION, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder
