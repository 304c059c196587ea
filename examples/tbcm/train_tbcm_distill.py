#!/usr/bin/env python
"""Distil a Sana text-to-image pipeline into a 1-4 step one, without images (TBCM, arXiv 2511.20410, Algorithm 1).

    accelerate launch examples/tbcm/train_tbcm_distill.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --prompts_file prompts.txt --output_dir outputs/tbcm-sana-0.6b --mixed_precision bf16

B prompts and N route steps give B (N - 1) training rows. The loop's steps:

    1. prompts -> frozen text encoder -> prompt_embeds (B, L, D), prompt_attention_mask (B, L); each prompt once
    2. sampling scheme -> timesteps (B, N), radians, descending from pi/2
    3. frozen teacher along its own denoising trajectory -> latents and velocity (B, N - 1, C, H, W)
    4. brightness filter on the trajectory's end -> rows kept, in a buffer that is trained on in random order
    5. the student with gradient and, in the same pass, its tangent along the teacher's velocity without
    6. loss, backward, clipping, optimiser, EMA
    7. the student, a plain SanaTransformer2DModel, inside a pipeline folder that any diffusers user can load

Steps 1 to 4 are in teacher_rows.py, step 5 and its loss in objectives.py. train_scm.py, train_sana_sprint.py and
train_lcm.py run this loop with other rows and losses, those of methods.py.
"""

import argparse
import math
import shutil
import sys
import time
from collections import deque
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median_low

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import SanaPipeline, SanaTransformer2DModel
from diffusers.optimization import get_scheduler
from distill_args import parse_args, training_table
from distill_setup import (
    STATE_BYTES,
    STATE_BYTES_8BIT,
    build_optimizer,
    build_student,
    check_accelerator,
    load_student,
)
from methods import TBCM, Method
from row_stream import RowStream
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from validation import validate

from diffusers_tbcm import TBCMScheduler
from diffusers_tbcm.data.embeddings import EmbeddingCache, PromptEncoder, encoder_fingerprint, precompute_embeddings
from diffusers_tbcm.data.prompts import draw_generator
from diffusers_tbcm.dual import checkpoint_dual
from diffusers_tbcm.export.folders import save_student_lora, save_student_pipeline
from diffusers_tbcm.export.hub import choose_license, prepare_repo, push_or_warn
from diffusers_tbcm.export.record import StudentDescription, training_config
from diffusers_tbcm.files import write_json
from diffusers_tbcm.lora import drop_frozen_weights, merge_lora
from diffusers_tbcm.loss import LogvarHead, StudentWithLogvar
from diffusers_tbcm.pipeline_folder import TRAINING_CONFIG, latent_size, resolve_teacher
from diffusers_tbcm.pipeline_sana_tbcm import COMPLEX_HUMAN_INSTRUCTION
from diffusers_tbcm.training.averaging import ShardedEMA
from diffusers_tbcm.training.checkpoints import find_checkpoint, save_checkpoint
from diffusers_tbcm.training.interruption import RESUMABLE_EXIT_CODE, StopRequest
from diffusers_tbcm.training.memory import memory_plan, peak_memory
from diffusers_tbcm.training.replay import Recording, ReplayBuffer
from diffusers_tbcm.training.tracking import MetricsLog
from diffusers_tbcm.transfer import HostCopy, to_device
from diffusers_tbcm.trigflow import TrigFlowTransformer, infer_timestep_scale
from diffusers_tbcm.versions import dtype_argument


logger = get_logger(__name__)

SIGMA_DATA = 0.5


def whole_weights(
    accelerator: Accelerator, model: torch.nn.Module, ema: ShardedEMA | None, trained: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The student's weights, averaged where there is an EMA; every process calls this, the main one gets all."""
    prefix = "student.transformer."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in accelerator.get_state_dict(model).items()
        if name.startswith(prefix)
    }
    if ema is not None:
        weights |= zip(trained, ema.full_weights(), strict=True)
    return weights


def train(args: argparse.Namespace, stop: StopRequest, method: Method) -> Accelerator:
    """Algorithm 1, from --resume_from_checkpoint to --max_train_steps or until asked to stop."""
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
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # Everything that can be wrong with the input is found here, before anything large is loaded.
    check_accelerator(accelerator, args)
    resume = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    data = method.rows.load_data(args)
    logger.info(str(data), main_process_only=True)
    prompts = data.prompts
    teacher_folder = resolve_teacher(args.pretrained_model_name_or_path)
    teacher_transformer = SanaTransformer2DModel.from_pretrained(teacher_folder, subfolder="transformer").float()
    size = latent_size(teacher_folder, teacher_transformer, args.resolution)
    latent_shape = (teacher_transformer.config.in_channels, size, size)
    method.objective.check_run(args, accelerator, teacher_transformer)
    push = None
    if args.push_to_hub and accelerator.is_main_process:
        terms = choose_license(teacher_folder, args.hub_license)
        repo_id = prepare_repo(args.hub_model_id, token=args.hub_token, private=args.hub_private_repo)
        push = partial(push_or_warn, repo_id=repo_id, token=args.hub_token, license=terms)
    config = training_config(vars(args), __file__)
    if accelerator.is_main_process:
        write_json(output_dir / TRAINING_CONFIG, config)
    accelerator.wait_for_everyone()

    # The teacher and the text encoder are frozen and run in the training precision; the student trains in float32.
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    reading = {
        "complex_human_instruction": COMPLEX_HUMAN_INSTRUCTION if args.complex_human_instruction else None,
        "max_sequence_length": args.max_sequence_length,
    }

    def make_encoder() -> PromptEncoder:
        text = SanaPipeline.from_pretrained(teacher_folder, vae=None, transformer=None, **dtype_argument(weight_dtype))
        text.text_encoder.requires_grad_(False)
        return PromptEncoder(text, device=device, offload=args.offload_text_encoder, **reading)

    encoder: PromptEncoder | EmbeddingCache
    if args.precompute_embeddings is None:
        encoder = make_encoder()
    else:
        fingerprint = encoder_fingerprint(teacher_folder, dtype=weight_dtype, **reading)
        precompute_embeddings(
            [*prompts, *(args.validation_prompts or [])],
            make_encoder,
            Path(args.precompute_embeddings),
            fingerprint,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        accelerator.wait_for_everyone()
        encoder = EmbeddingCache(Path(args.precompute_embeddings), fingerprint, device=device)
    negative = encoder([""])
    teacher_transformer.requires_grad_(False).eval().to(device)
    timestep_scale = infer_timestep_scale(teacher_transformer, negative.embeds, negative.mask)
    if args.validation_prompts and timestep_scale > 1:
        raise ValueError(
            f"--validation_prompts cannot be drawn: the teacher sees time multiplied by {timestep_scale:g}, which the"
            " Sana-Sprint pipelines do not; fine-tune it to dense time, or leave them out"
        )

    student_transformer = build_student(args, teacher_transformer, timestep_scale)
    if args.gradient_checkpointing:
        student_transformer.enable_gradient_checkpointing(checkpoint_dual)
    inner_dim = student_transformer.config.num_attention_heads * student_transformer.config.attention_head_dim
    student = TrigFlowTransformer(student_transformer, timestep_scale)
    model = StudentWithLogvar(student, LogvarHead(inner_dim)).to(device)
    teacher = TrigFlowTransformer(teacher_transformer, timestep_scale).to(weight_dtype)
    source = method.rows(
        args, accelerator, teacher, teacher_folder, encoder, data, latent_shape, sigma_data=SIGMA_DATA
    )
    rows_per_micro_step = args.train_batch_size * source.rows_per_prompt
    rows_per_step = rows_per_micro_step * accelerator.num_processes * args.gradient_accumulation_steps

    if accelerator.is_main_process:
        one = torch.ones(rows_per_micro_step, device=device)
        latents = torch.zeros((rows_per_micro_step, *latent_shape), device=device)
        text = negative.expand(args.train_batch_size)
        frozen: dict[str, torch.nn.Module] = {"teacher": teacher}
        if isinstance(encoder, PromptEncoder):
            frozen["text encoder"] = encoder.text_encoder
        plan = memory_plan(
            model,
            frozen,
            (latents, one, text.embeds, text.mask, one),
            state_bytes=STATE_BYTES_8BIT if args.use_8bit_adam else STATE_BYTES[args.optimizer],
            ema=args.use_ema,
            autocast_dtype=None if weight_dtype == torch.float32 else weight_dtype,
        )
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.items())
        print(f"Memory plan: {sum(plan.values()) / 2**30:.2f} GiB a process, before any sharding = {parts}")
    optimizer = build_optimizer(args, [p for p in model.parameters() if p.requires_grad], args.learning_rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    if args.compile:
        for block in (*teacher_transformer.transformer_blocks, *student_transformer.transformer_blocks):
            block.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    objective = method.objective(args, accelerator, model, teacher, sigma_data=SIGMA_DATA)
    student_transformer = accelerator.unwrap_model(model).student.transformer
    trained = {name: p for name, p in student_transformer.named_parameters() if p.requires_grad}
    ema = ShardedEMA(trained.values(), decay=args.ema_decay) if args.use_ema else None
    accelerator.register_for_checkpointing(*[part for part in (lr_scheduler, ema) if part is not None])
    if args.rank is not None:
        accelerator.register_save_state_pre_hook(drop_frozen_weights)
    first_step = 0
    if resume is not None:
        checkpoint, first_step = resume
        accelerator.load_state(str(checkpoint), strict=args.rank is None)
        logger.info(f"Resumed from {checkpoint} at step {first_step}", main_process_only=True)
    step = first_step
    if ema is not None:
        ema.to(device)
    if report_to is not None:
        accelerator.init_trackers("tbcm", config={name: str(value) for name, value in config["flags"].items()})
    stream = RowStream(args, accelerator, source)
    log = MetricsLog(accelerator, output_dir / "metrics.jsonl", first_step=first_step)
    scheduler = TBCMScheduler(sigma_data=SIGMA_DATA, guidance_scales=args.guidance_scales)
    draw_validation = partial(
        validate,
        prompts=args.validation_prompts,
        encoder=encoder,
        teacher_folder=teacher_folder,
        scheduler=scheduler,
        resolution=args.resolution,
        seed=args.seed,
        folder=output_dir / "validation",
        log=log,
    )

    prompts_per_recording = args.train_batch_size * accelerator.num_processes
    dropped_prompts = skipped_steps = skipped_in_a_row = rows_since_log = 0
    stopping, last_log = False, time.perf_counter()
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )

    def export() -> bool:
        """Step 7; every process calls it. False where the export was not pushed that was to be."""
        weights = whole_weights(accelerator, model, ema, trained)
        pushed = True
        if accelerator.is_main_process:
            exported = load_student(args, teacher.float(), weights)
            description = StudentDescription(
                prompt=(args.validation_prompts or prompts)[0],
                training=training_table(
                    args, method, step, number * prompts_per_recording, accelerator.mixed_precision
                ),
                config=config,
                samples=draw_validation(exported, step=step) if args.validation_prompts else (),
                resolution=args.resolution,
                image_free=method.image_free,
            )
            if args.rank is not None:
                folder = save_student_lora(
                    exported,
                    args.pretrained_model_name_or_path,
                    output_dir / "lora",
                    replace(description, model_id=f"{output_dir.name}/lora"),
                    guidance_scale=median_low(args.guidance_scales),
                )
                print(f"Adapters for load_lora_weights of a pipeline of the teacher: {folder}")
            if args.rank is None or args.merge_lora:
                folder = save_student_pipeline(
                    exported if args.rank is None else merge_lora(exported),
                    args.pretrained_model_name_or_path,
                    output_dir,
                    description,
                    scheduler=scheduler,
                    variants=args.export_variants,
                )
                print(f'Done. Draw with it:\n  SanaTBCMPipeline.from_pretrained("{output_dir}")("a prompt").images[0]')
            teacher.to(weight_dtype)
            pushed = push is None or push(folder)
        accelerator.wait_for_everyone()
        return pushed

    # The buffer holds one recording, all of whose rows are trained on at once, unless --replay_* say more.
    buffer = ReplayBuffer(max(1, args.replay_buffer_size // args.train_batch_size))
    micro_step = step * args.gradient_accumulation_steps
    number = first_number = -(-micro_step // args.replay_steps)  # recordings taken so far
    last_number = -(-args.max_train_steps * args.gradient_accumulation_steps // args.replay_steps)
    recordings = stream.numbered(max(0, number - buffer.capacity), last_number)
    # Steps 1 to 4. The teacher is always a recording ahead: whenever the host waits for a result, the GPU has work.
    ahead = deque(islice(recordings, 2))

    def take_recording() -> Recording:
        recording, keep = ahead.popleft() if ahead else next(recordings)
        buffer.add(recording.select(keep.read().nonzero().squeeze(1)))
        return recording

    for _ in range(min(number, buffer.capacity)):
        recording = take_recording()
    counts = torch.zeros(
        3, device=device
    )  # of the step, in all processes: rows kept, prompts dropped, requests to stop

    while step < args.max_train_steps:
        dropped = 0
        if micro_step % args.replay_steps == 0:
            recording = take_recording()
            number += 1
            dropped = args.train_batch_size - len(buffer.recordings[-1]) // source.rows_per_prompt
        draw = micro_step * accelerator.num_processes + accelerator.process_index
        rows = buffer.sample(rows_per_micro_step, draw_generator(draw, args.seed, stream=1))
        kept = len(rows)
        counts += accelerator.reduce(to_device(torch.tensor([kept, dropped, float(stop.received)]), device))
        if kept == 0:  # this process still takes part, at weight zero
            rows = recording.rows()

        with accelerator.accumulate(model, *objective.modules):
            # 5. The student, its tangent in the same pass, and the loss, a mean over these rows
            loss, measures = objective(rows, step, draw)

            # 6. The mean over the rows kept in all processes and micro-steps; backward, clipping, step, EMA
            accelerator.backward(loss * (kept / rows_per_micro_step))
            micro_step += 1
            if accelerator.sync_gradients:
                if source.filters:
                    scale = rows_per_step / counts[0].clamp(min=1)
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(scale)
                norms = [
                    accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
                    for module in (model, *objective.modules)
                ]
                norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
                status = HostCopy(torch.cat([counts, torch.stack(norms)]))
            if len(ahead) < 2:
                ahead.extend(islice(recordings, 1))
            if not accelerator.sync_gradients:
                continue
            kept_in_step, dropped_in_step, stops, grad_norm, *other_norms = status.read().tolist()
            counts.zero_()
            finite = all(map(math.isfinite, (grad_norm, *other_norms)))
            if kept_in_step == 0:
                logger.warning(f"Step {step}: the brightness filter dropped every prompt; no update")
            elif finite or accelerator.scaler is not None:  # with fp16 the scaler skips a step that is not finite
                for each in (optimizer, *objective.optimizers):
                    each.step()
            if kept_in_step > 0 and finite and ema is not None:
                ema.step(trained.values())
            for each in (optimizer, *objective.optimizers):
                each.zero_grad()
            lr_scheduler.step()
        step += 1
        progress.update()
        stopping |= stops > 0
        dropped_prompts += int(dropped_in_step)
        rows_since_log += int(kept_in_step)
        skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
        if not finite:
            skipped_steps += 1
            oldest = max(0, number - buffer.capacity - args.gradient_accumulation_steps + 1)
            seen = stream.prompt_numbers(range(oldest, number))
            bad = next(norm for norm in (grad_norm, *other_norms) if not math.isfinite(norm))
            logger.warning(f"Step {step}: gradient norm {bad}, no update; its prompts are among numbers {seen}")
        failing = skipped_in_a_row >= args.max_skipped_steps

        if step % args.logging_steps == 0 or step == args.max_train_steps or not finite:
            now = time.perf_counter()
            metrics = {"loss": loss.item()} | {name: float(value) for name, value in measures.items()}
            metrics |= {
                "grad_norm": grad_norm,
                "lr": lr_scheduler.get_last_lr()[0],
                "filtered_share": dropped_prompts / max(1, (number - first_number) * prompts_per_recording),
                "skipped_steps": skipped_steps,
                "rows_per_second": rows_since_log / (now - last_log),
                "peak_memory_gib": peak_memory(device) / 2**30,
            }
            last_log, rows_since_log = now, 0
            progress.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()})
            log(metrics, step)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps or stopping or failing:
            save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
        if failing:
            raise RuntimeError(
                f"{skipped_in_a_row} steps in a row were not finite (--max_skipped_steps): the weights from before"
                f" them are in checkpoint-{step}; try a lower --learning_rate or --mixed_precision bf16 or no"
            )
        if stopping and step < args.max_train_steps:
            progress.close()
            return accelerator
        if args.validation_prompts and step % args.validation_steps == 0 and step < args.max_train_steps:
            weights = whole_weights(accelerator, model, ema, trained)
            if accelerator.is_main_process:
                exported = load_student(args, teacher, weights)
                draw_validation(exported if args.rank is None else merge_lora(exported), step=step)
            accelerator.wait_for_everyone()
        if args.hub_strategy == "checkpoint" and step % args.checkpointing_steps == 0 and step < args.max_train_steps:
            export()
    progress.close()

    # 7. Export
    if not export():
        accelerator.end_training()
        sys.exit(1)  # the warning has said what to do
    return accelerator


def dry_run(args: argparse.Namespace, stop: StopRequest, method: Method) -> Accelerator:
    """One step, checkpoint, validation and export, then resume for another; gives time and memory of a step."""
    folder = Path(args.output_dir).with_name(Path(args.output_dir).name + ".dry_run")
    once = {"checkpointing_steps": 1, "validation_steps": 1, "logging_steps": 1, "output_dir": str(folder)}
    args.push_to_hub = False
    for steps, resume in ((1, None), (2, "latest")):
        changes = once | {"max_train_steps": steps, "resume_from_checkpoint": resume}
        accelerator = train(argparse.Namespace(**(vars(args) | changes)), stop, method)
    if accelerator.is_main_process:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        print(f"\nDry run: everything ran once, in {folder}, which is now deleted. Its two steps:")
        print("\n".join(lines))
        shutil.rmtree(folder)
    return accelerator


def main(args: argparse.Namespace, method: Method = TBCM) -> None:
    with StopRequest() as stop:
        accelerator = dry_run(args, stop, method) if args.dry_run else train(args, stop, method)
    accelerator.end_training()
    if stop.received:
        print(f"Stopped on request; --resume_from_checkpoint latest goes on. Exit code {RESUMABLE_EXIT_CODE}.")
        sys.exit(RESUMABLE_EXIT_CODE)


if __name__ == "__main__":
    main(parse_args(description=__doc__))
