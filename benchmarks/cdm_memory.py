"""Peak memory of CDM's step at full size: teacher, critic and student, whole or as two LoRA on one network.

    python -m benchmarks.cdm_memory                   # Sana 0.6B and 1.6B at 1024 px, 4 prompts, modelled

The step is that of examples/tbcm/train_cdm.py, with its own losses, on tensors without data, whose storages are
counted (memory_meter.py): trained weights in float32 under bf16 autocast, teacher in bf16, prompts embedded
beforehand, no EMA. A rollout is two passes here, as all of its passes are alike. Writes
benchmarks/results/cdm_memory_modelled.{json,md}.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_tbcm.flow import FlowTransformer
from diffusers_tbcm.lora import adapt, copy_trained
from diffusers_tbcm.matching import critic_loss
from diffusers_tbcm.rollout import record_rollout
from diffusers_tbcm.text import Text

from .common import CONFIGS, PROMPT_TOKENS, RESULTS, machine, random_transformer
from .memory import GB, by_kind, by_stage, written
from .memory_meter import ACTIVATIONS, GRADIENTS, WEIGHTS, MemoryMeter, cuda_autocast, fake_weights
from .memory_step import BF16, Setting, build_optimizer, make_states


CPU = torch.device("cpu")
train_cdm: Any = import_module("diffusers_tbcm.scripts.train_cdm")
NOTES = """
**Modelled, not measured**: the step ran on tensors without data. Attention is assumed to take a kernel that keeps no
scores. Workspaces of cuBLAS and cuDNN, the CUDA context and the allocator's fragmentation come on top. GB are 10^9
bytes; *counted* is the storages of all tensors at the moment of the step with the most of them, by kind. AdamW is
fused. Without the text encoder (Gemma 2 2B in bf16 would add 5.2 GB) and without an EMA (another copy of the trained
weights in float32). The autoencoder is there only before training, and for validation pictures.
"""


@dataclass
class Networks:
    """What a process holds; with LoRA, the three share one network's weights."""

    teacher: FlowTransformer
    student: FlowTransformer
    critic: FlowTransformer

    @property
    def modules(self) -> list[nn.Module]:
        return [self.teacher, self.student, self.critic]


def build(model: str, setting: Setting, args: argparse.Namespace, device: torch.device) -> Networks:
    """Random weights of the real sizes and dtypes, as the training script has them."""
    overrides = {} if args.layers is None else {"num_layers": args.layers}
    with device:
        transformer = random_transformer(model, args.resolution, **overrides)
        transformer.requires_grad_(False).eval()
        lora = setting.training == "LoRA"
        trained: Any = adapt(transformer, rank=args.rank) if lora else copy.deepcopy(transformer).requires_grad_(True)
        if setting.checkpointing:
            trained.enable_gradient_checkpointing()
        student = FlowTransformer(trained)
        critic = copy_trained(student)
    return Networks(FlowTransformer(transformer).to(BF16), student.train(), critic.train())


def autocast(network: nn.Module) -> Callable[..., torch.Tensor]:
    """A trained network as accelerate calls it."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", BF16):
            return network(*args, **kwargs)

    return call


def step(networks: Networks, args: argparse.Namespace, setting: Setting, meter: MemoryMeter) -> None:
    """One step of the critic and one of the student, steps 3 to 6 of the script."""
    trained = {name: getattr(networks, name) for name in ("critic", "student")}
    parameters = {name: [one for one in net.parameters() if one.requires_grad] for name, net in trained.items()}
    optimizers = {name: build_optimizer(setting, those) for name, those in parameters.items()}
    critic, student = autocast(networks.critic), autocast(networks.student)
    with meter:
        for name, optimizer in optimizers.items():
            make_states(optimizer, parameters[name], meter)
        size = args.resolution // 32
        text = Text(torch.randn(args.prompts, PROMPT_TOKENS, 2304), torch.ones(args.prompts, PROMPT_TOKENS))
        noise, sigmas = torch.randn(args.prompts, 32, size, size), torch.tensor([1.0, 0.5, 0.0])
        # What the script's own functions ask of a run
        run: Any = SimpleNamespace(
            device=CPU,
            log=lambda **_: None,
            generators=lambda count, stream: [torch.Generator() for _ in range(count)],
        )
        settings: Any = SimpleNamespace(augmentation_scale=3.5, timed_critic=False, augment_everywhere=False)
        distillation: Any = SimpleNamespace(teacher=networks.teacher, negative_text=text[:1])

        def update(name: str, loss: torch.Tensor) -> None:
            meter.label_rest(ACTIVATIONS)
            loss.backward()
            meter.label(GRADIENTS, [one.grad for one in parameters[name] if one.grad is not None])
            meter.begin(f"{name}: clipping and optimiser")
            nn.utils.clip_grad_norm_(parameters[name], 1.0, foreach=True)
            optimizers[name].step()
            optimizers[name].zero_grad()

        meter.begin("rollout")
        anchors = torch.ones(args.prompts, dtype=torch.long)
        rows = record_rollout(student, noise, sigmas, anchors, text, last_anchor=1).rows()
        meter.begin("critic")
        everywhere = torch.ones(args.prompts)
        sample, tau, noise = train_cdm.noised(run, rows.pred_original_sample, everywhere, train_cdm.CRITIC)
        update("critic", critic_loss(critic(sample, tau, **text.arguments()), rows.pred_original_sample, noise))
        meter.begin("student")
        losses = train_cdm.student_losses(settings, run, distillation, student, critic, rows)
        update("student", torch.stack(list(losses.values())).sum())
        meter.begin("")


def run(model: str, setting: Setting, args: argparse.Namespace, *, fake: bool = True) -> dict[str, Any]:
    """Count what a step holds.

    Args:
        model: `"0.6b"` or `"1.6b"`.
        setting: what is trained and how.
        args: resolution, prompts, rank, layers.
        fake: tensors without data.

    Returns:
        Bytes by kind at the peak of every stage.
    """
    meter = MemoryMeter(CPU)
    networks = build(model, setting, args, torch.device("meta") if fake else CPU)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad(), cuda_autocast():
        if fake:
            fake_weights(*networks.modules)
        for module in networks.modules:
            meter.label(WEIGHTS, module.parameters())
        step(networks, args, setting, meter)
    return {"setting": f"{model}, {setting}", "stages": meter.peaks()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=CONFIGS, nargs="+", default=list(CONFIGS))
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=4, help="of a step in one process")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA; the authors'")
    parser.add_argument("--layers", type=int, help="fewer than the model's")
    parser.add_argument("--without_checkpointing", action="store_true", help="these settings too")
    args = parser.parse_args()
    checkpointing = (True, False) if args.without_checkpointing else (True,)
    choices = product(("full", "LoRA"), checkpointing, ("AdamW", "8-bit AdamW"))
    settings = [Setting(*choice) for choice in choices]
    records = []
    for model, setting in product(args.models, settings):
        records.append(run(model, setting, args))
        kinds = max(records[-1]["stages"].values(), key=lambda stage: sum(stage.values()))
        print(f"{records[-1]['setting']}: {sum(kinds.values()) / GB:.2f} GB", flush=True)
    where = machine(CPU)
    title = (
        f"Peak memory of CDM's step, modelled: {args.prompts} prompts, {args.resolution} px, LoRA of rank {args.rank}"
    )
    versions = ", ".join(f"{key} {where[key]}" for key in ("torch", "diffusers", "python"))
    text = f"# {title}\n\n{versions}\n{NOTES}\n## By kind, GB\n\n{written(by_kind(records))}\n"
    text += f"## By stage, GB\n\n{written(by_stage(records))}"
    path = RESULTS / "cdm_memory_modelled"
    record = {"config": vars(args), **where, "settings": records}
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
