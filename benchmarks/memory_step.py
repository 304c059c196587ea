"""The training step whose memory is measured: what is trained and how, its networks, and the step itself."""

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.diffusion import diffuse
from diffusers_tbcm.dual import checkpoint_dual
from diffusers_tbcm.lora import make_lora_student
from diffusers_tbcm.loss import LogvarHead, StudentWithLogvar, consistency_loss
from diffusers_tbcm.rows import TrainingRows
from diffusers_tbcm.tangent import TangentOutput, consistency_tangent, dual_inputs, normalized_tangent
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.memory import peak_memory
from diffusers_tbcm.trajectory import record_trajectory
from diffusers_tbcm.trigflow import SIGMA_DATA, TrigFlowTransformer

from .common import PROMPT_TOKENS, random_transformer
from .memory_meter import ACTIVATIONS, GRADIENTS, STATES, WEIGHTS, MemoryMeter, cuda_autocast, fake_weights


BF16 = torch.bfloat16
VAE = {  # of the published Sana models; the decoder is in memory and does not run
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


@dataclass(frozen=True)
class Setting:
    """What is trained and how; `source` is the teacher's trajectory, or images and the autoencoder's dtype."""

    training: str
    checkpointing: bool
    optimiser: str
    source: str = ""
    two_passes: bool = False

    def __str__(self) -> str:
        checkpointing = "checkpointing" if self.checkpointing else "no checkpointing"
        order = "two passes" if self.two_passes else ""
        return ", ".join(filter(None, (self.training, checkpointing, self.optimiser, self.source, order)))


SETTINGS = {
    str(setting): setting
    for setting in (
        *(Setting(training, checkpointing, optimiser) for training in ("full", "LoRA")
          for checkpointing in (False, True) for optimiser in ("AdamW", "8-bit AdamW")),
        *(Setting("full", checkpointing, "AdamW", two_passes=True) for checkpointing in (False, True)),
        *(Setting("full", True, "AdamW", f"images, VAE in {dtype}") for dtype in ("float32", "bfloat16")),
    )
}  # fmt: skip


@dataclass
class Networks:
    model: StudentWithLogvar
    teacher: TrigFlowTransformer
    vae: AutoencoderDC | None

    @property
    def modules(self) -> list[nn.Module]:
        return [module for module in (self.model, self.teacher, self.vae) if module is not None]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


class EightBitStates(torch.optim.Optimizer):
    """Holds the states of bitsandbytes' AdamW8bit, which runs on a GPU only, and leaves the weights as they are."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if self.state[parameter]:
                continue
            small = parameter.numel() < 4096  # kept in float32
            for name in ("state1", "state2"):
                self.state[parameter][name] = torch.zeros_like(parameter, dtype=None if small else torch.uint8)
                if not small:  # a scale for every block of 256
                    scales = torch.zeros(math.ceil(parameter.numel() / 256), device=parameter.device)
                    self.state[parameter][f"{name} scales"] = scales


def build(setting: Setting, args: argparse.Namespace, device: torch.device) -> Networks:
    """Random weights of the real sizes and dtypes, as the training script has them."""
    overrides = {} if args.layers is None else {"num_layers": args.layers}
    with device:
        transformer = random_transformer(args.model, args.resolution, **overrides)
        lora = setting.training == "LoRA"
        student = make_lora_student(transformer, rank=args.rank) if lora else make_student(transformer)
        if setting.checkpointing:
            student.enable_gradient_checkpointing(checkpoint_dual)
        model = StudentWithLogvar(TrigFlowTransformer(student), LogvarHead(transformer.config.cross_attention_dim))
        vae = None
        if setting.source:
            dtype = torch.float32 if "float32" in setting.source else BF16
            vae = AutoencoderDC(**VAE).to(dtype).eval().requires_grad_(False)
    teacher = TrigFlowTransformer(transformer.requires_grad_(False).eval()).to(BF16)
    return Networks(model.train(), teacher, vae)


def build_optimizer(setting: Setting, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if setting.optimiser != "8-bit AdamW":
        return torch.optim.AdamW(parameters, fused=True)
    if not torch.cuda.is_available():
        return EightBitStates(parameters)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters)


def make_states(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], meter: MemoryMeter) -> None:
    """Have the optimiser make its states, as the first step of a run does."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    meter.label(STATES, [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)])


def trajectory_rows(
    networks: Networks, args: argparse.Namespace, device: torch.device, meter: MemoryMeter
) -> TrainingRows:
    """TBCM: the teacher's trajectory of one prompt; its points are repeated where there are fewer than rows."""
    meter.begin("teacher")
    embeds, mask = torch.randn(1, PROMPT_TOKENS, 2304, device=device), torch.ones(1, PROMPT_TOKENS, device=device)
    size = args.resolution // 32
    text, guidance = Text(embeds, mask), torch.full((1,), 4.5, device=device)
    recording = record_trajectory(
        networks.teacher,
        torch.randn(1, 32, size, size, device=device),
        torch.linspace(math.pi / 2, 0.1, args.route_steps, device=device)[None],
        text,
        text,
        guidance,
        sigma_data=SIGMA_DATA,
    )
    rows = recording.rows(torch.arange(args.rows, device=device) % len(recording))
    return replace(rows, text=text)


@torch.no_grad()
def image_rows(networks: Networks, args: argparse.Namespace, device: torch.device, meter: MemoryMeter) -> TrainingRows:
    """What TBCM does without: pictures through the autoencoder, noised, and the teacher's velocity there."""
    meter.begin("VAE encoding")
    rows, vae = args.rows, networks.vae
    assert vae is not None
    images = torch.randn(rows, 3, args.resolution, args.resolution, device=device, dtype=vae.dtype)
    original = vae.encode(images).latent.float() * (vae.config.scaling_factor * SIGMA_DATA)
    meter.begin("teacher")
    t = torch.rand(rows, device=device)
    latents = diffuse(original, torch.randn_like(original), t)
    embeds, mask = (
        torch.randn(rows, PROMPT_TOKENS, 2304, device=device),
        torch.ones(rows, PROMPT_TOKENS, device=device),
    )
    both = networks.teacher(
        latents.repeat(2, 1, 1, 1) / SIGMA_DATA, t.repeat(2), embeds.repeat(2, 1, 1), mask.repeat(2, 1)
    )
    unconditional, conditional = both.chunk(2)
    velocity = SIGMA_DATA * (unconditional + 4.5 * (conditional - unconditional))
    return TrainingRows(latents, velocity, t, original, Text(embeds, mask), torch.full((rows,), 4.5, device=device))


def two_passes(
    model: StudentWithLogvar, rows: TrainingRows, meter: MemoryMeter
) -> tuple[torch.Tensor, torch.Tensor, TangentOutput]:
    """The published order: the tangent by `torch.func.jvp`, then the forward that keeps a graph."""
    meter.begin("tangent")
    with torch.autocast(rows.latents.device.type, BF16):
        tangent = consistency_tangent(
            model.student,
            rows.latents,
            rows.velocity,
            rows.timesteps,
            rows.text,
            rows.guidance_scale,
            ratio=1.0,
            sigma_data=SIGMA_DATA,
        )
    meter.begin("forward and backward")
    with torch.autocast(rows.latents.device.type, BF16):
        output, logvar = model(
            rows.latents / SIGMA_DATA,
            rows.timesteps,
            **rows.text.arguments(),
            guidance=rows.guidance_scale,
        )
    return output, logvar, tangent


def one_pass(
    model: StudentWithLogvar, rows: TrainingRows, meter: MemoryMeter
) -> tuple[torch.Tensor, torch.Tensor, TangentOutput]:
    """The tangent with the forward that keeps a graph."""
    meter.begin("forward and backward")
    with torch.autocast(rows.latents.device.type, BF16):
        output, logvar = model(
            *dual_inputs(rows.latents, rows.velocity, rows.timesteps, SIGMA_DATA),
            **rows.text.arguments(),
            guidance=rows.guidance_scale,
        )
    tangent = normalized_tangent(output, rows.latents, rows.velocity, rows.timesteps, ratio=1.0, sigma_data=SIGMA_DATA)
    return output.primal, logvar, tangent


def training_step(
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    rows: TrainingRows,
    meter: MemoryMeter,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, TangentOutput]] = one_pass,
) -> None:
    """One step; `forward` gives the output with its graph, the log-variance and the tangent, and names its stages."""
    output, logvar, tangent = forward(networks.model, rows, meter)
    loss = consistency_loss(output, tangent.trig_output, tangent.tangent, logvar, rows.timesteps, SIGMA_DATA)
    meter.label_rest(ACTIVATIONS)
    loss.backward()
    meter.label(GRADIENTS, [parameter.grad for parameter in networks.trained if parameter.grad is not None])
    meter.begin("clipping and optimiser")
    torch.nn.utils.clip_grad_norm_(networks.trained, 0.1, foreach=True)
    optimizer.step()
    optimizer.zero_grad()


def run(setting: Setting, args: argparse.Namespace, device: torch.device, *, fake: bool) -> dict[str, Any]:
    """One step of a setting, on real tensors or on fake ones, and what they held.

    Args:
        setting: what is trained and how.
        args: model, resolution, rows, route_steps, rank, layers.
        device: where; the CPU for fake tensors.
        fake: tensors without data.

    Returns:
        Bytes at the peak of every stage: by kind as counted, and as measured by torch (GPU) or, for the whole process,
        by the system (real tensors on a CPU).
    """
    before = peak_memory(device)
    meter = MemoryMeter(device)
    record_rows = image_rows if setting.source else trajectory_rows
    networks = build(setting, args, torch.device("meta") if fake else device)
    with FakeTensorMode() if fake else nullcontext(), cuda_autocast() if device.type == "cpu" else nullcontext():
        if fake:
            fake_weights(*networks.modules)
        for module in networks.modules:
            meter.label(WEIGHTS, module.parameters())
        optimizer = build_optimizer(setting, networks.trained)
        with meter:
            make_states(optimizer, networks.trained, meter)
            rows = record_rows(networks, args, device, meter)
            training_step(networks, optimizer, rows, meter, two_passes if setting.two_passes else one_pass)
            meter.begin("")
    record: dict[str, Any] = {"setting": str(setting), "stages": meter.peaks()}
    if device.type == "cuda":
        record["measured"] = meter.measured
        record["reserved"] = torch.cuda.max_memory_reserved(device)
    elif not fake:
        record["resident"] = peak_memory(device) - before
    return record
