"""The flags of evaluate.py, and what is checked of them before anything is loaded."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers_tbcm.data.columns import MJHQ_30K
from diffusers_tbcm.pipeline_folder import TRAINING_RECORD


def parse_args(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline folder or Hub id of a student")
    parser.add_argument("--lora", help="LoRA weights to load into it; --model may then be their teacher")
    parser.add_argument("--teacher", help="pipeline folder or Hub id of a SanaPipeline to measure beside it")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="the student's")
    parser.add_argument("--teacher_steps", type=int, nargs="+", default=[20], help="the last is the one compared with")
    parser.add_argument("--output_dir", type=Path, required=True)

    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts_file", help="text with one prompt a line, or csv, json, jsonl or parquet")
    prompts.add_argument("--dataset_name", help=f"`datasets` id or folder; {MJHQ_30K} is known with its columns")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--label_column", help="the concept that a prompt asks for and a picture shows, for retrieval")
    parser.add_argument("--image_column", help="of --dataset_name: its pictures are the real ones")
    parser.add_argument("--max_prompts", type=int, help="the first so many")

    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--reference_dir", help="folder of real pictures; names of folders in it are their labels")
    reference.add_argument(
        "--reference_file", type=Path, help="features of real pictures: an earlier run's reference.safetensors"
    )
    reference.add_argument("--reference_teacher", action="store_true", help="the teacher's pictures, from other noise")
    parser.add_argument(
        "--features", choices=("mobilenet", "inception"), default="mobilenet", help="inception needs torch-fidelity"
    )

    score = parser.add_mutually_exclusive_group()
    score.add_argument("--clip_model", help="folder or Hub id of a CLIP model that scores pictures against prompts")
    score.add_argument("--text_image_head", help="pipeline folder with a text-image head, which does so offline")

    parser.add_argument("--num_images_per_prompt", type=int, default=1, help="2 or more measure diversity too")
    parser.add_argument("--bootstrap_resamples", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at a time, in each process")
    parser.add_argument("--guidance_scale", type=float, default=4.5)
    parser.add_argument("--resolution", type=int, help="pixels a side; the transformer's own by default")
    parser.add_argument("--max_sequence_length", type=int, default=300, help="tokens of a prompt")
    parser.add_argument(
        "--complex_human_instruction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put Sana's instruction before each prompt; --no- for a student that was distilled without it",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--update_card", action="store_true", help="put the results into --model, a folder, and its card"
    )
    args = parser.parse_args(argv)
    args.command = "python examples/tbcm/evaluate.py " + shlex.join(
        Path(word).name if os.path.isabs(word) else word for word in (sys.argv[1:] if argv is None else argv)
    )

    for name in ("max_prompts", "num_images_per_prompt", "batch_size", "resolution", "max_sequence_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: it takes at least 1")
    for name in ("steps", "teacher_steps"):
        if min(getattr(args, name)) < 1 or len({*getattr(args, name)}) < len(getattr(args, name)):
            parser.error(f"--{name} is {getattr(args, name)}: it takes different numbers from 1 on")
    if args.bootstrap_resamples < 2:
        parser.error(f"--bootstrap_resamples is {args.bootstrap_resamples}: it takes at least 2")
    if args.reference_teacher and args.teacher is None:
        parser.error("--reference_teacher needs --teacher")
    if args.image_column is not None and args.dataset_name is None:
        parser.error("--image_column is of --dataset_name, which is not given")
    if args.reference_file is not None and not args.reference_file.is_file():
        parser.error(f"--reference_file {str(args.reference_file)!r} does not exist")
    if args.update_card and not (Path(args.model) / TRAINING_RECORD).is_file():
        parser.error(f"--update_card needs --model to be a folder that training wrote, with its {TRAINING_RECORD}")
    return args
