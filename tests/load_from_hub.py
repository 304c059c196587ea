"""Load a repository in every way that its users do, in a process of its own: python load_from_hub.py REPO

Prints a JSON object: for every row, what it gave and the pictures that it drew, or why there is none. Rows without our
package come first, while importing it is an error.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline


STEPS = (1, 2, 4)
STOCK = {"max_timesteps": math.pi / 2, "height": 64, "width": 64, "use_resolution_binning": False}


def drawn(pipe: Any, **options: Any) -> dict[str, Any]:
    """A pipeline's class, and a digest of its pictures by number of steps."""
    pipe.set_progress_bar_config(disable=True)
    pictures = {}
    for steps in STEPS:
        generator = torch.Generator().manual_seed(3)
        if options:
            options["intermediate_timesteps"] = 1.0 if steps == 2 else None
        images = pipe("a dolphin", num_inference_steps=steps, generator=generator, output_type="np", **options).images
        pictures[steps] = hashlib.sha256(images.tobytes()).hexdigest()
    return {"class": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__, "pictures": pictures}


def diffusion_pipeline(repo: str) -> dict[str, Any]:
    return drawn(DiffusionPipeline.from_pretrained(repo), **STOCK)


def auto_pipeline(repo: str) -> dict[str, Any]:
    return drawn(AutoPipelineForText2Image.from_pretrained(repo), **STOCK)


def sana_tbcm_pipeline(repo: str) -> dict[str, Any]:
    from diffusers_tbcm import SanaTBCMPipeline

    return drawn(SanaTBCMPipeline.from_pretrained(repo))


def from_pipe(repo: str) -> dict[str, Any]:
    from diffusers_tbcm import SanaTBCMPipeline

    stock = DiffusionPipeline.from_pretrained(repo)
    pipe = SanaTBCMPipeline.from_pipe(stock)
    shared = all(getattr(pipe, name) is getattr(stock, name) for name in ("transformer", "vae", "text_encoder"))
    return drawn(pipe) | {"shared": shared}


ROWS_WITHOUT_PACKAGE: list[Callable[[str], dict[str, Any]]] = [diffusion_pipeline, auto_pipeline]
ROWS_WITH_PACKAGE: list[Callable[[str], dict[str, Any]]] = [sana_tbcm_pipeline, from_pipe]


def main(repo: str) -> None:
    sys.modules["diffusers_tbcm"] = None
    results = {}
    for row in (*ROWS_WITHOUT_PACKAGE, *ROWS_WITH_PACKAGE):
        if row is ROWS_WITH_PACKAGE[0]:
            del sys.modules["diffusers_tbcm"]
        try:
            results[row.__name__] = row(repo)
        except ValueError as error:
            results[row.__name__] = {"error": str(error)}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
