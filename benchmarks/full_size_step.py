#!/usr/bin/env python
"""One training step at full size, with random weights: does it run, is it finite, what does it cost?

    python benchmarks/full_size_step.py                              # CPU: 1 prompt, 2 route steps, float32
    python benchmarks/full_size_step.py --route_steps 16 --dtype bf16 --gradient_checkpointing      # GPU

Prints one JSON object: seconds of every stage, peak memory, device and versions.
"""

import argparse
import json
import platform
import time

import torch
from diffusers import SanaTransformer2DModel

from diffusers_tbcm.loss import LogvarHead, StudentWithLogvar, consistency_loss
from diffusers_tbcm.memory import peak_memory
from diffusers_tbcm.tangent import consistency_tangent
from diffusers_tbcm.trajectory import record_trajectory, sample_timesteps
from diffusers_tbcm.trigflow import TrigFlowTransformer, make_student


SIGMA_DATA = 0.5
PROMPT_TOKENS = 300
CONFIGS = {
    "0.6b": {
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
    "1.6b": {
        "num_layers": 20,
        "num_attention_heads": 70,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
    },
}


def random_transformer(model: str, resolution: int, **overrides: int) -> SanaTransformer2DModel:
    """A transformer of a published size, in dense time, for a resolution in pixels."""
    return SanaTransformer2DModel(
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,
        sample_size=resolution // 32,
        **{**CONFIGS[model], **overrides},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="0.6b")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--train_batch_size", type=int, default=1, help="prompts")
    parser.add_argument("--route_steps", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the teacher and of autocast")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=1, help="the first one warms up; the last one is reported")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    torch.manual_seed(0)
    size = args.resolution // 32
    transformer = random_transformer(args.model, args.resolution)
    model = StudentWithLogvar(
        TrigFlowTransformer(make_student(transformer)), LogvarHead(transformer.config.cross_attention_dim)
    ).to(device)
    if args.gradient_checkpointing:
        model.student.transformer.enable_gradient_checkpointing()
    teacher = TrigFlowTransformer(transformer.requires_grad_(False)).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rows = args.train_batch_size * (args.route_steps - 1)
    seconds: dict[str, float] = {}

    def stage(name: str, start: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - start, 3)
        return time.perf_counter()

    for _ in range(args.steps):
        embeds = torch.randn(args.train_batch_size, PROMPT_TOKENS, 2304, device=device)
        guidance = torch.full((args.train_batch_size,), 4.5, device=device)
        start = time.perf_counter()
        trajectory = record_trajectory(
            teacher,
            torch.randn(args.train_batch_size, 32, size, size, device=device),
            sample_timesteps("reference", args.train_batch_size, args.route_steps, device=device),
            embeds,
            embeds[:1, :1],
            guidance,
            sigma_data=SIGMA_DATA,
        )
        start = stage("teacher", start)
        latents, velocity, t = (
            value.flatten(0, 1) for value in (trajectory.latents, trajectory.velocity, trajectory.timesteps)
        )
        embeds, guidance = (value.repeat_interleave(args.route_steps - 1, dim=0) for value in (embeds, guidance))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tangent = consistency_tangent(
                model.student, latents, velocity, t, embeds, guidance, ratio=1.0, sigma_data=SIGMA_DATA
            )
            start = stage("tangent", start)
            output, logvar = model(latents / SIGMA_DATA, t, embeds, None, guidance)
        loss = consistency_loss(output, tangent.trig_output, tangent.tangent, logvar, t, SIGMA_DATA)
        loss.backward()
        start = stage("forward and backward", start)
        gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item()
        optimizer.step()
        optimizer.zero_grad()
        stage("clip and optimiser", start)

    finite = all(parameter.isfinite().all().item() for parameter in model.parameters())
    record = {
        "config": vars(args),
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": rows,
        "seconds": seconds,
        "loss": loss.item(),
        "gradient_norm": gradient_norm,
        "tangent_norm": tangent.norm.mean().item(),
        "all_parameters_finite": finite,
        "peak_memory_gib": round(peak_memory(device) / 2**30, 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(record, indent=2))
    if not finite:
        raise SystemExit("a parameter is not finite")


if __name__ == "__main__":
    main()
