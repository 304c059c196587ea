"""What a prompts file costs: reading it, embedding it once, and training from the embeddings on disk.

    python -m benchmarks.prompt_cache                    # 100,000 prompts, the embedded mini teacher
    python -m benchmarks.prompt_cache --prompts 500

Every stage runs in a process of its own, so that its memory is its own: resident beyond what the imports take.
Prints one JSON object and writes it to --output.
"""

import argparse
import json
import multiprocessing
import platform
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from diffusers import SanaPipeline

from diffusers_tbcm.backbones.sana import INSTRUCTION
from diffusers_tbcm.data.embeddings import EmbeddingCache, PromptEncoder, encoder_fingerprint, precompute_embeddings
from diffusers_tbcm.data.prompts import load_prompts
from diffusers_tbcm.pipeline_folder import resolve_teacher
from diffusers_tbcm.versions import dtype_argument

from .common import EMBEDDED_TEACHER, RESULTS


WORDS = "a red blue old small cat dog boat house on in under the sea hill rain by night day photo of painting".split()
BATCHES = 200  # read at random, after the first
MIB = 2**20


def resident() -> int:
    return psutil.Process().memory_info().rss


def write_prompts(path: Path, count: int) -> None:
    """Different prompts of 5 to 40 words."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            file.write(f"{' '.join(rng.choices(WORDS, k=rng.randint(4, 39)))} {index}\n")


def make_encoder(teacher: Path, settings: dict[str, Any], dtype: torch.dtype) -> PromptEncoder:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = SanaPipeline.from_pretrained(teacher, vae=None, transformer=None, **dtype_argument(dtype))
    pipeline.text_encoder.requires_grad_(False).to(device)
    return PromptEncoder(pipeline, **settings)


def read(prompts_file: Path) -> dict[str, Any]:
    before, start = resident(), time.perf_counter()
    found = load_prompts(prompts_file)
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 3), "prompts": len(found.prompts), "resident_mib": (resident() - before) / MIB}


def precompute(
    prompts_file: Path, folder: Path, teacher: Path, settings: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    prompts = load_prompts(prompts_file).prompts
    before, start = resident(), time.perf_counter()
    fingerprint = encoder_fingerprint(teacher, dtype=dtype, **settings)
    embedded = precompute_embeddings(prompts, partial(make_encoder, teacher, settings, dtype), folder, fingerprint)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 3),
        "embedded": embedded,
        "prompts_per_second": round(embedded / seconds, 1),
        "resident_mib": (resident() - before) / MIB,
    }


def train(
    prompts_file: Path, folder: Path, teacher: Path, settings: dict[str, Any], dtype: torch.dtype, batch_size: int
) -> dict[str, Any]:
    """What a training run does before its first step and at each: read, fingerprint, check, index, read batches."""
    before, start = resident(), time.perf_counter()
    prompts = load_prompts(prompts_file).prompts
    fingerprint = encoder_fingerprint(teacher, dtype=dtype, **settings)
    precompute_embeddings(prompts, never, folder, fingerprint)
    cache = EmbeddingCache(folder, fingerprint)
    cache(prompts[:batch_size])
    first = time.perf_counter() - start
    rng, start = random.Random(1), time.perf_counter()
    for _ in range(BATCHES):
        cache(rng.choices(prompts, k=batch_size))
    return {
        "seconds_to_first_batch": round(first, 3),
        "batch_size": batch_size,
        "milliseconds_per_batch": round((time.perf_counter() - start) / BATCHES * 1000, 3),
        "resident_mib": (resident() - before) / MIB,
    }


def never() -> PromptEncoder:
    raise AssertionError("a complete folder needs no encoder")


def alone(stage: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run a stage in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(stage, args)
    result["resident_mib"] = round(result["resident_mib"], 1)
    print(f"{stage.__name__}: {result}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default=str(EMBEDDED_TEACHER))
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--max_sequence_length", type=int, default=300)
    parser.add_argument("--complex_human_instruction", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the text encoder")
    parser.add_argument("--output", default=str(RESULTS / "prompt_cache_cpu.json"))
    args = parser.parse_args()

    settings = {
        "complex_human_instruction": INSTRUCTION if args.complex_human_instruction else None,
        "max_sequence_length": args.max_sequence_length,
    }
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    teacher = resolve_teacher(args.pretrained_model_name_or_path)
    machine = {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "cores": psutil.cpu_count(),
        "load_average_before": psutil.getloadavg()[0],
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    print(machine, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        prompts_file, folder = Path(scratch, "prompts.txt"), Path(scratch, "embeddings")
        write_prompts(prompts_file, args.prompts)
        embed = partial(alone, precompute, prompts_file, folder, teacher, settings, dtype)
        stages = {"read": alone(read, prompts_file), "precompute": embed()}
        stages["train"] = alone(train, prompts_file, folder, teacher, settings, dtype, args.train_batch_size)
        shards = sorted(folder.iterdir())
        size = sum(shard.stat().st_size for shard in shards)
        for shard in shards[::2]:
            shard.unlink()
        stages["rebuild_half"] = embed()
    record = {
        "config": {
            **{name: value for name, value in vars(args).items() if name != "output"},
            "pretrained_model_name_or_path": Path(args.pretrained_model_name_or_path).name,  # not where it lies
        },
        **stages,
        "shards": len(shards),
        "folder_mib": round(size / MIB, 1),
        **machine,
    }
    print(json.dumps(record, indent=2))
    Path(args.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
