"""The flags that all training scripts share, and what can be checked before anything is loaded."""

import argparse
from pathlib import Path

from diffusers.optimization import SchedulerType
from methods import TBCM, Method

from diffusers_tbcm.pipeline_folder import MODEL_INDEX, VARIANTS
from diffusers_tbcm.training.checkpoints import list_checkpoints


def parse_args(
    argv: list[str] | None = None, description: str | None = None, method: Method = TBCM
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    data = parser.add_argument_group("teacher and data")
    data.add_argument("--pretrained_model_name_or_path", required=True, help="Sana pipeline: folder or Hub id")
    data.add_argument("--dataset_config_name")
    data.add_argument("--dataset_split", default="train")
    data.add_argument("--caption_column", default="text")
    data.add_argument(
        "--precompute_embeddings",
        metavar="DIR",
        help="embed every prompt once into DIR, or use what is there; the text encoder is not loaded for training",
    )
    data.add_argument("--max_sequence_length", type=int, default=300, help="tokens of a prompt")
    data.add_argument(
        "--complex_human_instruction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put Sana's instruction before every prompt, as its pipelines do",
    )
    data.add_argument("--resolution", type=int, help="pixels a side; default: the teacher's own")
    data.add_argument("--output_dir", required=True)

    method.rows.add_flags(parser)
    method.objective.add_flags(parser)

    rows = parser.add_argument_group("rows")
    rows.add_argument("--guidance_scales", type=float, nargs="+", default=[4.0, 4.5, 5.0], help="one per prompt")
    rows.add_argument(
        "--replay_buffer_size",
        type=int,
        default=0,
        help="prompts per process whose rows are kept, and drawn from at random; 0: one batch, used once",
    )
    rows.add_argument(
        "--teacher_batch_size",
        type=int,
        help="prompts per process that the teacher runs on at once; default: --train_batch_size",
    )
    rows.add_argument("--replay_steps", type=int, default=1, help="backward passes per batch of the teacher's")

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
    optim.add_argument("--rank", type=int, help="train LoRA adapters of this rank on the teacher's own weights")
    optim.add_argument("--lora_alpha", type=int, help="default: the rank")
    optim.add_argument("--lora_target_modules", nargs="+", help="layers by the end of their names; default: all large")
    optim.add_argument("--merge_lora", action="store_true", help="also save the pipeline with the adapters merged in")
    optim.add_argument("--use_8bit_adam", action="store_true", help="AdamW's states in 8 bits (bitsandbytes)")
    optim.add_argument("--max_skipped_steps", type=int, default=10, help="non-finite steps in a row that end the run")
    optim.add_argument("--use_ema", action="store_true", help="validate and export averaged weights")
    optim.add_argument("--ema_decay", type=float, default=0.999)
    optim.add_argument("--gradient_checkpointing", action="store_true")
    optim.add_argument("--compile", action="store_true", help="torch.compile the blocks of teacher and student")
    optim.add_argument("--allow_tf32", action="store_true", help="faster float32 products on an NVIDIA GPU")
    optim.add_argument("--offload_text_encoder", action="store_true", help="keep it on the CPU between prompts")
    optim.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's setting")
    optim.add_argument("--seed", type=int, default=0)

    keep = parser.add_argument_group("checkpoints, validation, logs")
    keep.add_argument("--checkpointing_steps", type=int, default=500)
    keep.add_argument("--checkpoints_total_limit", type=int)
    keep.add_argument("--resume_from_checkpoint", help="'latest' or a checkpoint folder")
    keep.add_argument("--validation_prompts", nargs="+", help="drawn at 1, 2 and 4 steps")
    keep.add_argument("--validation_steps", type=int, default=500)
    keep.add_argument(
        "--export_variants",
        nargs="+",
        default=[],
        choices=tuple(VARIANTS),
        help="half-precision copies of the weights",
    )
    keep.add_argument("--report_to", default="tensorboard", help="an accelerate tracker, or 'none'")
    keep.add_argument("--logging_steps", type=int, default=10)
    keep.add_argument("--dry_run", action="store_true", help="everything once, in a folder beside output_dir; report")

    hub = parser.add_argument_group("Hub")
    hub.add_argument("--push_to_hub", action="store_true", help="publish the student; access is checked at the start")
    hub.add_argument("--hub_model_id", help="owner/name; default: the name of output_dir, under the token's user")
    hub.add_argument("--hub_token", help="with write access; default: HF_TOKEN or `hf auth login`")
    hub.add_argument("--hub_private_repo", action="store_true", default=None, help="if the repository is created")
    hub.add_argument("--hub_strategy", choices=("end", "checkpoint"), default="end", help="also at every checkpoint")
    hub.add_argument("--hub_license", help="such as apache-2.0, where the teacher's card names none")

    args = parser.parse_args(argv)
    check_args(parser, args)
    method.rows.check_flags(parser, args)
    method.objective.check_flags(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message that names the flag and its value, before anything is loaded."""
    if min(args.guidance_scales) <= 0:
        parser.error(f"--guidance_scales is {args.guidance_scales}: every scale has to be positive")
    if args.teacher_batch_size is None:
        args.teacher_batch_size = args.train_batch_size
    for name in (
        "train_batch_size", "teacher_batch_size", "gradient_accumulation_steps", "max_train_steps",
        "checkpointing_steps", "logging_steps", "validation_steps", "replay_steps", "max_sequence_length",
        "max_skipped_steps", "learning_rate", "max_grad_norm",
    ):  # fmt: skip
        if not getattr(args, name) > 0:
            parser.error(f"--{name} is {getattr(args, name)}: it has to be positive")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        parser.error(f"--checkpoints_total_limit is {args.checkpoints_total_limit}: the last one is always kept")
    if args.replay_buffer_size < 0:
        parser.error(f"--replay_buffer_size is {args.replay_buffer_size}: it must not be negative")
    for name in ("replay_buffer_size", "teacher_batch_size"):
        if getattr(args, name) % args.train_batch_size:
            parser.error(
                f"--{name} is {getattr(args, name)}: it has to be a multiple of --train_batch_size"
                f" {args.train_batch_size}"
            )
    if args.replay_steps > 1 and args.replay_buffer_size <= args.train_batch_size:
        parser.error(
            f"--replay_steps is {args.replay_steps}, which trains on the same rows {args.replay_steps} times in a row"
            " unless --replay_buffer_size holds more prompts than one batch"
        )
    if not 0 <= args.ema_decay < 1:
        parser.error(f"--ema_decay is {args.ema_decay}: it has to lie in [0, 1)")
    for name in ("lora_alpha", "lora_target_modules", "merge_lora"):
        if args.rank is None and getattr(args, name):
            parser.error(f"--{name} needs --rank")
    if args.export_variants and args.rank is not None and not args.merge_lora:
        parser.error("--export_variants are of a pipeline: with --rank they need --merge_lora")
    for name in ("rank", "lora_alpha"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}: it has to be positive")
    if args.use_8bit_adam and args.optimizer != "adamw":
        parser.error(f"--use_8bit_adam is AdamW's, --optimizer is {args.optimizer}")
    for name in ("hub_model_id", "hub_token", "hub_private_repo", "hub_license"):
        if not args.push_to_hub and getattr(args, name):
            parser.error(f"--{name} needs --push_to_hub")
    if args.hub_strategy == "checkpoint" and not args.push_to_hub:
        parser.error("--hub_strategy checkpoint needs --push_to_hub")
    if args.hub_token and args.report_to == "wandb":
        parser.error("--hub_token would be sent to wandb with the command line: use HF_TOKEN or `hf auth login`")
    output_dir = Path(args.output_dir)
    if args.hub_model_id is None:
        args.hub_model_id = output_dir.resolve().name
    if output_dir.exists() and not output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file")
    holds_run = (output_dir / MODEL_INDEX).exists() or list_checkpoints(output_dir)
    if holds_run and args.resume_from_checkpoint is None:
        parser.error(
            f"--output_dir {args.output_dir} holds another run: continue it with --resume_from_checkpoint latest, or"
            " choose another folder"
        )


def training_table(
    args: argparse.Namespace, method: Method, steps: int, prompts_seen: int, precision: str
) -> dict[str, object]:
    """What the model card says about the run."""
    return {
        "method": method.name,
        "steps": steps,
        "prompts seen": prompts_seen,
        **method.rows.describe(args),
        **method.objective.describe(args),
        "replay": (
            f"{args.replay_buffer_size} prompts, {args.replay_steps} steps a recording"
            if args.replay_buffer_size
            else "off"
        ),
        "guidance scales": ", ".join(f"{scale:g}" for scale in args.guidance_scales),
        "optimiser": f"{args.optimizer}, lr {args.learning_rate:g} {args.lr_scheduler}, clip {args.max_grad_norm:g}",
        "weights": "all" if args.rank is None else f"LoRA of rank {args.rank}, guidance embedder",
        "EMA": args.ema_decay if args.use_ema else "off",
        "precision": precision,
        "seed": args.seed,
    }
