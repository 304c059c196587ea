"""What the training scripts build from their flags: optimiser and student; and the launches that they refuse."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from diffusers import SanaTransformer2DModel

from diffusers_tbcm.lora import make_lora_student
from diffusers_tbcm.trigflow import TrigFlowTransformer, make_student


STATE_BYTES = {"adamw": 8, "came": 4}  # of the optimiser, per trained weight
STATE_BYTES_8BIT = 2


def build_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    if args.optimizer == "adamw":
        if args.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, lr=learning_rate, weight_decay=args.weight_decay)
        # Fused: one pass over the weights, and no temporary copies of them.
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=args.weight_decay, fused=True)
    from came_pytorch import CAME

    # Betas and epsilons of the reference.
    return CAME(
        parameters,
        lr=learning_rate,
        weight_decay=args.weight_decay,
        betas=(0.9, 0.999, 0.9999),
        eps=(1e-30, 1e-16),
    )


def check_accelerator(accelerator: Accelerator, args: argparse.Namespace) -> None:
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP) and not accelerator.is_fsdp2:
        raise ValueError(
            f"this accelerate configuration is {accelerator.distributed_type.value}: the tangent's forward-mode"
            " derivative is tested with one process, DDP and FSDP2 (fsdp_version: 2)"
        )
    if args.rank is not None and accelerator.is_fsdp2:
        raise ValueError("--rank shares the base's weights with the teacher, which FSDP2 would shard: use DDP")
    if args.report_to != "none" and args.report_to not in map(str, get_available_trackers()):
        raise ValueError(f"--report_to is {args.report_to!r}, which is not installed or no tracker of accelerate")


def build_student(
    args: argparse.Namespace, teacher: SanaTransformer2DModel, timestep_scale: float
) -> SanaTransformer2DModel:
    if args.rank is None:
        student = make_student(teacher)
    else:
        targets = {} if args.lora_target_modules is None else {"target_modules": args.lora_target_modules}
        student = make_lora_student(teacher, rank=args.rank, alpha=args.lora_alpha, **targets)
    student.register_to_config(timestep_scale=timestep_scale)
    return student


def load_student(
    args: argparse.Namespace, teacher: TrigFlowTransformer, weights: dict[str, torch.Tensor]
) -> SanaTransformer2DModel:
    """A copy of the student in its teacher's dtype."""
    student = build_student(args, teacher.transformer, teacher.timestep_scale)
    student.load_state_dict(weights)
    return student.eval()
