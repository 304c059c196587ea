#!/usr/bin/env python
"""Distil a Sana text-to-image pipeline into a 1-4 step one, without images (TBCM, arXiv 2511.20410, Algorithm 1).

    accelerate launch examples/tbcm/train_tbcm_distill.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --prompts_file prompts.txt --output_dir outputs/tbcm-sana-0.6b --mixed_precision bf16

B prompts and N route steps give B (N - 1) training rows. The loop's steps:

    1. prompts -> frozen text encoder -> prompt_embeds (B, L, D), prompt_attention_mask (B, L); each prompt once
    2. sampling scheme -> timesteps (B, N), radians, descending from pi/2
    3. frozen teacher along its own denoising trajectory -> latents and velocity (B, N - 1, C, H, W)
    4. brightness filter on the trajectory's end -> rows kept
    5. tangent of the student along the teacher's velocity, without gradient
    6. loss, backward, clipping, optimiser, EMA
    7. the student, a plain SanaTransformer2DModel, inside a pipeline folder that any diffusers user can load
"""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.brightness import black_latent, keep_mask
from diffusers_tbcm.checkpoints import find_checkpoint, list_checkpoints, save_checkpoint
from diffusers_tbcm.evaluation import image_grid
from diffusers_tbcm.hub import MODEL_INDEX, resolve_teacher, save_student_pipeline, vae_scale_factor
from diffusers_tbcm.loss import LogvarHead, StudentWithLogvar, consistency_error, consistency_loss
from diffusers_tbcm.pipeline_sana_tbcm import COMPLEX_HUMAN_INSTRUCTION
from diffusers_tbcm.prompts import PromptEncoder, draw_generator, load_dataset_prompts, prompt_at, read_prompts
from diffusers_tbcm.tangent import consistency_tangent, tangent_ratio
from diffusers_tbcm.trajectory import SAMPLING_SCHEMES, record_trajectory, sample_timesteps
from diffusers_tbcm.trigflow import TrigFlowTransformer, infer_timestep_scale, make_student


logger = get_logger(__name__)

SIGMA_DATA = 0.5
VALIDATION_STEPS_GRID = (1, 2, 4)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    data = parser.add_argument_group("teacher and prompts")
    data.add_argument("--pretrained_model_name_or_path", required=True, help="Sana pipeline: folder or Hub id")
    data.add_argument("--prompts_file", help="UTF-8 text, one prompt a line")
    data.add_argument("--dataset_name", help="instead of a file: a `datasets` Hub id, folder or data file")
    data.add_argument("--dataset_config_name")
    data.add_argument("--dataset_split", default="train")
    data.add_argument("--caption_column", default="text")
    data.add_argument("--max_sequence_length", type=int, default=300, help="tokens of a prompt")
    data.add_argument(
        "--complex_human_instruction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put Sana's instruction before every prompt, as its pipelines do",
    )
    data.add_argument("--resolution", type=int, help="pixels a side; default: the teacher's own")
    data.add_argument("--output_dir", required=True)

    method = parser.add_argument_group("method")
    method.add_argument("--route_steps", type=int, default=16, help="teacher steps N of a trajectory")
    method.add_argument("--sampling_scheme", choices=SAMPLING_SCHEMES, default="reference")
    method.add_argument("--flow_shift", type=float, default=2.5, help="of the reference route")
    method.add_argument("--logit_mean", type=float, default=0.2, help="of the logit_normal scheme")
    method.add_argument("--logit_std", type=float, default=1.6, help="of the logit_normal scheme")
    method.add_argument("--guidance_scales", type=float, nargs="+", default=[4.0, 4.5, 5.0], help="one per prompt")
    method.add_argument("--tangent_warmup_steps", type=int, default=4000)
    method.add_argument("--tangent_cooldown_start_step", type=int, default=15000, help="-1: no cooldown")
    method.add_argument("--tangent_cooldown_steps", type=int, default=2000)
    method.add_argument("--tangent_final_ratio", type=float, default=0.75)
    method.add_argument("--tangent_resolution_invariant", action="store_true", help="norm over the root of its size")
    method.add_argument("--brightness_threshold", type=float, default=1.0, help="0: no filter, the VAE never loads")
    method.add_argument("--brightness_hard", action="store_true", help="drop all below the threshold (the paper)")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--train_batch_size", type=int, default=1, help="prompts per process and backward pass")
    optim.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optim.add_argument("--max_train_steps", type=int, default=20000)
    optim.add_argument("--optimizer", choices=("adamw", "came"), default="adamw")
    optim.add_argument("--learning_rate", type=float, default=1e-5)
    optim.add_argument("--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="constant")
    optim.add_argument("--lr_warmup_steps", type=int, default=0)
    optim.add_argument("--weight_decay", type=float, default=0.0)
    optim.add_argument("--max_grad_norm", type=float, default=0.1)
    optim.add_argument("--use_ema", action="store_true", help="validate and export averaged weights")
    optim.add_argument("--ema_decay", type=float, default=0.999)
    optim.add_argument("--gradient_checkpointing", action="store_true")
    optim.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's setting")
    optim.add_argument("--seed", type=int, default=0)

    keep = parser.add_argument_group("checkpoints, validation, logs")
    keep.add_argument("--checkpointing_steps", type=int, default=500)
    keep.add_argument("--checkpoints_total_limit", type=int)
    keep.add_argument("--resume_from_checkpoint", help="'latest' or a checkpoint folder")
    keep.add_argument("--validation_prompts", nargs="+", help="drawn at 1, 2 and 4 steps")
    keep.add_argument("--validation_steps", type=int, default=500)
    keep.add_argument("--report_to", default="tensorboard", help="an accelerate tracker, or 'none'")
    keep.add_argument("--logging_steps", type=int, default=10)

    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message that names the flag and its value, before anything is loaded."""
    if (args.prompts_file is None) == (args.dataset_name is None):
        parser.error("give either --prompts_file or --dataset_name")
    if args.route_steps < 2:
        parser.error(f"--route_steps is {args.route_steps}: it takes 2, as the step at pi/2 gives no training row")
    if min(args.guidance_scales) <= 0:
        parser.error(f"--guidance_scales is {args.guidance_scales}: every scale has to be positive")
    for name in (
        "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps", "logging_steps",
        "validation_steps", "max_sequence_length", "learning_rate", "max_grad_norm", "flow_shift", "logit_std",
    ):  # fmt: skip
        if not getattr(args, name) > 0:
            parser.error(f"--{name} is {getattr(args, name)}: it has to be positive")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        parser.error(f"--checkpoints_total_limit is {args.checkpoints_total_limit}: the last one is always kept")
    if args.brightness_threshold < 0:
        parser.error(f"--brightness_threshold is {args.brightness_threshold}: it must not be negative")
    if not 0 <= args.ema_decay < 1:
        parser.error(f"--ema_decay is {args.ema_decay}: it has to lie in [0, 1)")
    if args.tangent_cooldown_start_step < 0:
        args.tangent_cooldown_start_step = None
    try:
        tangent_ratio(
            0,
            args.tangent_warmup_steps,
            args.tangent_cooldown_start_step,
            args.tangent_cooldown_steps,
            args.tangent_final_ratio,
        )
    except ValueError as error:
        parser.error(f"--tangent_*: {error}")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file")
    holds_run = (output_dir / MODEL_INDEX).exists() or list_checkpoints(output_dir)
    if holds_run and args.resume_from_checkpoint is None:
        parser.error(
            f"--output_dir {args.output_dir} holds another run: continue it with --resume_from_checkpoint latest, or"
            " choose another folder"
        )


def latent_size(teacher_folder: Path, transformer: SanaTransformer2DModel, resolution: int | None) -> int:
    """Latent pixels a side, from the autoencoder's config alone."""
    factor = vae_scale_factor(teacher_folder)
    if resolution is None:
        return transformer.config.sample_size
    multiple = factor * transformer.config.patch_size
    if resolution < multiple or resolution % multiple:
        raise ValueError(f"--resolution is {resolution}: it has to be a positive multiple of {multiple} pixels")
    size = resolution // factor
    if transformer.config.interpolation_scale is not None and size != transformer.config.sample_size:
        native = transformer.config.sample_size * factor
        raise ValueError(f"--resolution is {resolution}: this teacher's position embedding is for {native} pixels")
    return size


def load_black_latent(teacher_folder: Path, pixels: int, cache: Path) -> torch.Tensor:
    """The one use of the VAE in training, once: the encoder sees a black image."""
    if not cache.exists():
        vae = AutoencoderDC.from_pretrained(teacher_folder, subfolder="vae", dtype=torch.float32)
        save_file({"black_latent": black_latent(vae, pixels, pixels).contiguous()}, cache)
    return load_file(cache)["black_latent"]


def build_optimizer(args: argparse.Namespace, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    from came_pytorch import CAME

    # Betas and epsilons of the reference.
    return CAME(
        parameters,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(0.9, 0.999, 0.9999),
        eps=(1e-30, 1e-16),
    )


@torch.no_grad()
def draw_validation(
    student: SanaTransformer2DModel, text: SanaPipeline, teacher_folder: Path, args: argparse.Namespace, path: Path
) -> np.ndarray:
    """Draw the validation prompts, with noise fixed by --seed, into a labelled grid: (1, H, W, 3) bytes."""
    pipeline = SanaTBCMPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.text_encoder,
        vae=AutoencoderDC.from_pretrained(teacher_folder, subfolder="vae").to(student.device),
        transformer=student,
        scheduler=TBCMScheduler(sigma_data=SIGMA_DATA),
    )
    pipeline.set_progress_bar_config(disable=True)
    columns = [
        pipeline(
            args.validation_prompts,
            num_inference_steps=steps,
            generator=[draw_generator(index, args.seed) for index in range(len(args.validation_prompts))],
            height=args.resolution,
            width=args.resolution,
            max_sequence_length=args.max_sequence_length,
            complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION if args.complex_human_instruction else None,
        ).images
        for steps in VALIDATION_STEPS_GRID
    ]
    labels = [f"{steps} step{'s' * (steps > 1)}" for steps in VALIDATION_STEPS_GRID]
    grid = image_grid(list(zip(*columns, strict=True)), labels, args.validation_prompts)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return np.asarray(grid)[None]


@contextmanager
def averaged_weights(ema: EMAModel | None, transformer: SanaTransformer2DModel) -> Iterator[None]:
    """Run a block with the EMA's weights in place of the trained ones."""
    if ema is not None:
        ema.store(transformer.parameters())
        ema.copy_to(transformer.parameters())
    yield
    if ema is not None:
        ema.restore(transformer.parameters())


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    report_to = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    set_seed(args.seed)
    device = accelerator.device

    # Everything that can be wrong with the input is found here, before anything large is loaded.
    resume = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    prompts = (
        read_prompts(args.prompts_file)
        if args.prompts_file is not None
        else load_dataset_prompts(
            args.dataset_name,
            config=args.dataset_config_name,
            split=args.dataset_split,
            column=args.caption_column,
        )
    )
    teacher_folder = resolve_teacher(args.pretrained_model_name_or_path)
    teacher_transformer = SanaTransformer2DModel.from_pretrained(
        teacher_folder, subfolder="transformer", dtype=torch.float32
    )
    size = latent_size(teacher_folder, teacher_transformer, args.resolution)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "training_config.json").write_text(json.dumps(vars(args), indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()

    # The teacher and the text encoder are frozen and run in the training precision; the student trains in float32.
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    text = SanaPipeline.from_pretrained(teacher_folder, vae=None, transformer=None, dtype=weight_dtype)
    text.text_encoder.requires_grad_(False).to(device)
    encoder = PromptEncoder(
        text,
        complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION if args.complex_human_instruction else None,
        max_sequence_length=args.max_sequence_length,
    )
    negative_embeds, negative_mask = encoder([""])
    teacher_transformer.requires_grad_(False).eval().to(device)
    timestep_scale = infer_timestep_scale(teacher_transformer, negative_embeds, negative_mask)
    if args.validation_prompts and timestep_scale > 1:
        raise ValueError(
            f"--validation_prompts cannot be drawn: the teacher sees time multiplied by {timestep_scale:g}, which the"
            " Sana-Sprint pipelines do not; fine-tune it to dense time, or leave them out"
        )

    student_transformer = make_student(teacher_transformer)
    student_transformer.register_to_config(timestep_scale=timestep_scale)
    if args.gradient_checkpointing:
        student_transformer.enable_gradient_checkpointing()
    inner_dim = student_transformer.config.num_attention_heads * student_transformer.config.attention_head_dim
    model = StudentWithLogvar(TrigFlowTransformer(student_transformer, timestep_scale), LogvarHead(inner_dim))
    teacher = TrigFlowTransformer(teacher_transformer, timestep_scale).to(weight_dtype)
    black = None
    if args.brightness_threshold > 0:
        pixels = size * vae_scale_factor(teacher_folder)
        with accelerator.main_process_first():
            black = load_black_latent(teacher_folder, pixels, output_dir / f"black_latent_{pixels}.safetensors")
        black = black.to(device)

    optimizer = build_optimizer(args, [p for p in model.parameters() if p.requires_grad])
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    student = accelerator.unwrap_model(model).student
    ema = EMAModel(student.transformer.parameters(), decay=args.ema_decay) if args.use_ema else None
    accelerator.register_for_checkpointing(*[part for part in (lr_scheduler, ema) if part is not None])
    step = 0
    if resume is not None:
        checkpoint, step = resume
        accelerator.load_state(str(checkpoint))
        logger.info(f"Resumed from {checkpoint} at step {step}", main_process_only=True)
    if ema is not None:
        ema.to(device)
    if report_to is not None:
        accelerator.init_trackers("tbcm", config={name: str(value) for name, value in vars(args).items()})

    guidance_choices = torch.tensor(args.guidance_scales)
    rows_per_prompt = args.route_steps - 1
    prompts_per_micro_step = args.train_batch_size * accelerator.num_processes
    first_draw = args.train_batch_size * accelerator.process_index
    kept_in_step = dropped_prompts = 0
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    micro_step = step * args.gradient_accumulation_steps

    while step < args.max_train_steps:
        # 1. Prompts. Draw k of the whole run is the same prompt and the same noise however many processes share it.
        draws = [micro_step * prompts_per_micro_step + first_draw + i for i in range(args.train_batch_size)]
        generators = [draw_generator(draw, args.seed) for draw in draws]
        prompt_embeds, prompt_mask = encoder([prompts[prompt_at(draw, len(prompts), args.seed)] for draw in draws])
        picks = [torch.randint(len(guidance_choices), (), generator=generator) for generator in generators]
        guidance_scale = guidance_choices[torch.stack(picks)].to(device)
        shape = (student.transformer.config.in_channels, size, size)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

        # 2. Timesteps
        timesteps = sample_timesteps(
            args.sampling_scheme,
            args.train_batch_size,
            args.route_steps,
            shift=args.flow_shift,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            sigma_data=SIGMA_DATA,
            generator=generators,
            device=device,
        )

        # 3. The teacher's trajectory
        trajectory = record_trajectory(
            teacher,
            noise,
            timesteps,
            prompt_embeds,
            negative_embeds,
            guidance_scale,
            prompt_attention_mask=prompt_mask,
            negative_prompt_attention_mask=negative_mask,
            sigma_data=SIGMA_DATA,
        )

        # 4. Brightness filter. A process without rows still takes part, with one prompt's rows at weight zero.
        keep = torch.ones(args.train_batch_size, dtype=torch.bool, device=device)
        if black is not None:
            keep = keep_mask(
                trajectory.pred_original_sample,
                black,
                args.brightness_threshold,
                sigma_data=SIGMA_DATA,
                hard=args.brightness_hard,
                generator=generators,
            )
        kept = int(keep.sum())
        kept_everywhere = int(accelerator.reduce(keep.sum()))
        kept_in_step += kept_everywhere
        dropped_prompts += prompts_per_micro_step - kept_everywhere
        if kept == 0:
            keep[0] = True
        latents, velocity, t = (
            value[keep].flatten(0, 1) for value in (trajectory.latents, trajectory.velocity, trajectory.timesteps)
        )
        row_embeds, row_mask, row_guidance = (
            value[keep].repeat_interleave(rows_per_prompt, dim=0)
            for value in (prompt_embeds, prompt_mask, guidance_scale)
        )

        # 5. Tangent
        ratio = tangent_ratio(
            step,
            args.tangent_warmup_steps,
            args.tangent_cooldown_start_step,
            args.tangent_cooldown_steps,
            args.tangent_final_ratio,
        )
        with accelerator.autocast():
            tangent = consistency_tangent(
                student,
                latents,
                velocity,
                t,
                row_embeds,
                row_guidance,
                prompt_attention_mask=row_mask,
                ratio=ratio,
                sigma_data=SIGMA_DATA,
                resolution_invariant=args.tangent_resolution_invariant,
            )

        # 6. Loss (the mean over the rows kept in all processes), backward, clipping, step, EMA
        with accelerator.accumulate(model):
            trig_output, logvar = model(latents / SIGMA_DATA, t, row_embeds, row_mask, row_guidance)
            loss = consistency_loss(trig_output, tangent.trig_output, tangent.tangent, logvar, t, SIGMA_DATA)
            accelerator.backward(loss * (kept * accelerator.num_processes / max(kept_everywhere, 1)))
            micro_step += 1
            if not accelerator.sync_gradients:
                continue
            grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm))
            if kept_in_step == 0:
                logger.warning(f"Step {step}: the brightness filter dropped every prompt; no update")
            elif not math.isfinite(grad_norm) and accelerator.scaler is None:
                logger.warning(f"Step {step}: gradient norm {grad_norm}, from prompts {draws}; no update")
            else:
                optimizer.step()  # with fp16 the scaler skips a step that is not finite
                if ema is not None:
                    ema.step(student.transformer.parameters())
            optimizer.zero_grad()
            lr_scheduler.step()
        step += 1
        progress.update()

        if step % args.logging_steps == 0 or step == args.max_train_steps:
            error = consistency_error(trig_output.detach(), tangent.trig_output, tangent.tangent).mean()
            logs = {
                "loss": loss.item(),
                "error": error.item(),
                "tangent_norm": tangent.norm.mean().item(),
                "tangent_ratio": ratio,
                "grad_norm": grad_norm,
                "lr": lr_scheduler.get_last_lr()[0],
                "dropped_prompts": dropped_prompts,
            }
            progress.set_postfix({name: f"{value:.3g}" for name, value in logs.items()})
            accelerator.log(logs, step=step)
        kept_in_step = 0
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
        due = step % args.validation_steps == 0 or step == args.max_train_steps
        if args.validation_prompts and due and accelerator.is_main_process:
            with averaged_weights(ema, student.transformer):
                path = output_dir / "validation" / f"step-{step}.png"
                grid = draw_validation(student.transformer, text, teacher_folder, args, path)
            for tracker in accelerator.trackers:  # the others show numbers only
                if tracker.name == "tensorboard":
                    tracker.log_images({"validation": grid}, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({"validation": list(grid)}, step=step)
    progress.close()

    # 7. Export
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(student.transformer.parameters())
        save_student_pipeline(
            student.transformer,
            args.pretrained_model_name_or_path,
            output_dir,
            resolution=args.resolution,
            prompt=(args.validation_prompts or prompts)[0],
            training=training_table(args, step, prompts_per_micro_step, accelerator.mixed_precision),
            scheduler=TBCMScheduler(sigma_data=SIGMA_DATA),
        )
        print(f'\nDone. Draw with it:\n  SanaTBCMPipeline.from_pretrained("{output_dir}")("a prompt").images[0]')
    accelerator.end_training()


def training_table(
    args: argparse.Namespace, steps: int, prompts_per_micro_step: int, precision: str
) -> dict[str, object]:
    """What the model card says about the run."""
    cooldown = (
        "no cooldown"
        if args.tangent_cooldown_start_step is None
        else f"cooldown from step {args.tangent_cooldown_start_step} over {args.tangent_cooldown_steps}"
    )
    return {
        "method": "TBCM, image-free",
        "steps": steps,
        "prompts seen": steps * prompts_per_micro_step * args.gradient_accumulation_steps,
        "route": f"{args.sampling_scheme}, {args.route_steps} steps, shift {args.flow_shift}",
        "tangent ratio": f"warm-up {args.tangent_warmup_steps}, {cooldown}, final {args.tangent_final_ratio}",
        "guidance scales": ", ".join(f"{scale:g}" for scale in args.guidance_scales),
        "optimiser": f"{args.optimizer}, lr {args.learning_rate:g} {args.lr_scheduler}, clip {args.max_grad_norm:g}",
        "EMA": args.ema_decay if args.use_ema else "off",
        "precision": precision,
        "seed": args.seed,
    }


if __name__ == "__main__":
    main(parse_args())
