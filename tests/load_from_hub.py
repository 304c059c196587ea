"""Load what was pushed in every way that its users do, in a process of its own:

    python load_from_hub.py REPO LORA_REPO TEACHER

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
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SanaPipeline
from huggingface_hub import is_offline_mode


STEPS = (1, 2, 4)
STOCK = {"max_timesteps": math.pi / 2, "height": 64, "width": 64, "use_resolution_binning": False}
STOCK |= {"max_sequence_length": 16}  # what the student was distilled with, as its card says and as it says itself


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


def custom_pipeline(repo: str) -> dict[str, Any]:
    # Diffusers asks the Hub for the revision of a repository's code even when it is offline, but not for a folder's.
    source = str(DiffusionPipeline.download(repo)) if is_offline_mode() else repo
    return drawn(DiffusionPipeline.from_pretrained(source, custom_pipeline=source, trust_remote_code=True))


def sana_tbcm_pipeline(repo: str) -> dict[str, Any]:
    from diffusers_tbcm import SanaTBCMPipeline

    return drawn(SanaTBCMPipeline.from_pretrained(repo))


def from_pipe(repo: str) -> dict[str, Any]:
    from diffusers_tbcm import SanaTBCMPipeline

    stock = DiffusionPipeline.from_pretrained(repo)
    pipe = SanaTBCMPipeline.from_pipe(stock)
    shared = all(getattr(pipe, name) is getattr(stock, name) for name in ("transformer", "vae", "text_encoder"))
    return drawn(pipe) | {"shared": shared}


def one_step(pipe: Any, **options: Any) -> dict[str, Any]:
    """A pipeline's class, and some pixels of its picture."""
    generator = torch.Generator().manual_seed(3)
    image = pipe("a dolphin", num_inference_steps=1, generator=generator, output_type="np", **options).images[0]
    return {"class": type(pipe).__name__, "pixels": image[::8, ::8].tolist()}


def teacher_alone(lora_repo: str, teacher: str) -> dict[str, Any]:
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    return one_step(SanaPipeline.from_pretrained(teacher), guidance_scale=1.0, **size)


def lora_on_stock_pipeline(lora_repo: str, teacher: str) -> dict[str, Any]:
    pipe = SanaPipeline.from_pretrained(teacher)
    pipe.load_lora_weights(lora_repo, weight_name="pytorch_lora_weights.safetensors")  # which offline mode asks for
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    return one_step(pipe, guidance_scale=1.0, sigmas=[1.0], **size)


def lora_on_ours(lora_repo: str, teacher: str) -> dict[str, Any]:
    from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler

    pipe = SanaTBCMPipeline.from_pretrained(teacher, scheduler=TBCMScheduler())
    pipe.load_lora_weights(lora_repo, weight_name="pytorch_lora_weights.safetensors")  # which offline mode asks for
    return one_step(pipe, guidance_scale=4.5)


PIPELINES_WITHOUT_PACKAGE = [diffusion_pipeline, auto_pipeline, custom_pipeline]
LORAS_WITHOUT_PACKAGE = [teacher_alone, lora_on_stock_pipeline]
PIPELINES_WITH_PACKAGE = [sana_tbcm_pipeline, from_pipe]
LORAS_WITH_PACKAGE = [lora_on_ours]


def main(repo: str, lora_repo: str, teacher: str) -> None:
    results = {}

    def load(rows: list[Callable[..., dict[str, Any]]], *arguments: str) -> None:
        for row in rows:
            try:
                results[row.__name__] = row(*arguments)
            except ValueError as error:
                results[row.__name__] = {"error": str(error)}

    sys.modules["diffusers_tbcm"] = None
    load(PIPELINES_WITHOUT_PACKAGE, repo)
    load(LORAS_WITHOUT_PACKAGE, lora_repo, teacher)
    del sys.modules["diffusers_tbcm"]
    load(PIPELINES_WITH_PACKAGE, repo)
    load(LORAS_WITH_PACKAGE, lora_repo, teacher)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
