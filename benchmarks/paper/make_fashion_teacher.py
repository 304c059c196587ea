"""A second teacher for the study, so that no claim rests on one data set: Fashion-MNIST, prompted by class names.

The embedded emoji teacher goes on learning, text encoder and transformer together, on 5000 pictures of clothes; its
autoencoder and tokenizer stay. A prompt stands for 500 pictures, where an emoji's stands for 2 or 4: here it is the
noise that decides most.

    python -m benchmarks.paper.make_fashion_teacher --data_dir DATA --output_dir runs/fashion_teacher
    python -m benchmarks.paper.study table2 --teacher runs/fashion_teacher \
        --train_data_dir runs/fashion_teacher/pictures

DATA holds train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz of github.com/zalandoresearch/fashion-mnist (MIT
licence; Debian's package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist). The same command
continues what was interrupted. Half an hour on one CPU core; a GPU is used where there is one.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline
from PIL import Image

from diffusers_tbcm.evaluation.evaluator import FeatureReference, MobileNetFeatures
from examples.tbcm.mini_teacher.emoji_data import RESOLUTION, caption, write_image_folder
from examples.tbcm.mini_teacher.emoji_metrics import (
    DISTILLATION_PROMPTS_FILE,
    REFERENCE_FILE,
    EvaluationPrompt,
    Meter,
    draw,
    save_evaluation,
)
from examples.tbcm.mini_teacher.make_mini_teacher import (
    TextToLatent,
    encode_images,
    reconstruction_psnr,
    save_pipeline,
    train_teacher,
)

from ..common import EMBEDDED_TEACHER, default_device


CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CAPTIONS = ("{c}", "{a} on white", "a picture of {a}", "{c} in black and white")
PICTURES_PER_CLASS = 500
PICTURES = "pictures"
EVALUATION_PROMPTS = 500
STEPS = (4, 20)
LABEL_HEADER, IMAGE_HEADER = 8, 16  # bytes of the idx format before the data


def read_idx(data_dir: Path, name: str, header: int) -> np.ndarray:
    path = data_dir / f"train-{name}-ubyte.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --data_dir takes the folder with Fashion-MNIST's .gz files")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def load_pictures(data_dir: Path, per_class: int) -> tuple[torch.Tensor, list[str]]:
    """The first pictures of each class, black on white at the teacher's resolution, and their classes.

    Args:
        data_dir: folder with the two idx files.
        per_class: how many of each class.

    Returns:
        (10 per_class, 3, RESOLUTION, RESOLUTION) uint8, and as many names.

    Raises:
        FileNotFoundError: where a file is missing.
    """
    labels = read_idx(data_dir, "labels-idx1", LABEL_HEADER)
    pixels = read_idx(data_dir, "images-idx3", IMAGE_HEADER).reshape(len(labels), 28, 28)
    chosen = np.concatenate([np.flatnonzero(labels == number)[:per_class] for number in range(len(CLASSES))])
    size = (RESOLUTION, RESOLUTION)
    large = [np.asarray(Image.fromarray(255 - pixels[i]).resize(size, Image.Resampling.BICUBIC)) for i in chosen]
    images = torch.from_numpy(np.stack(large)).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    return images, [CLASSES[number] for number in labels[chosen]]


def captions_of(concept: str) -> list[str]:
    return [caption(template, concept) for template in CAPTIONS]


def write_data(images: torch.Tensor, concepts: list[str], folder: Path, seed: int) -> list[EvaluationPrompt]:
    """Write the pictures with their captions, the distillation prompts and the evaluation prompts; give the last."""
    write_image_folder(images, [captions_of(concept) for concept in concepts], folder / PICTURES)
    prompts = [text for concept in CLASSES for text in captions_of(concept)]
    (folder / DISTILLATION_PROMPTS_FILE).write_text("\n".join(prompts) + "\n", encoding="utf-8")
    rng = random.Random(seed)
    chosen = [CLASSES[number % len(CLASSES)] for number in range(EVALUATION_PROMPTS)]
    evaluation = [EvaluationPrompt(rng.choice(captions_of(concept)), concept, False) for concept in chosen]
    save_evaluation(evaluation, folder)
    return evaluation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with Fashion-MNIST's .gz files")
    parser.add_argument("--output_dir", type=Path, required=True, help="the pipeline folder, data included")
    parser.add_argument("--work_dir", type=Path, help="of the training's checkpoint; default: OUTPUT_DIR.work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ema_decay", type=float, default=0.995)
    parser.add_argument("--logit_mean", type=float, default=0.4, help="of the logit-normal flow time, 1 = noise")
    parser.add_argument("--logit_std", type=float, default=1.4)
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir or args.output_dir.with_name(args.output_dir.name + ".work")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images, concepts = load_pictures(args.data_dir, PICTURES_PER_CLASS)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = default_device()

    emoji = SanaPipeline.from_pretrained(EMBEDDED_TEACHER)
    vae = emoji.vae.to(device).requires_grad_(False)
    vae.register_to_config(scaling_factor=1.0)
    latents = encode_images(vae, images, device)
    vae.register_to_config(scaling_factor=1.0 / latents.std().item())
    latents = latents * vae.config.scaling_factor
    psnr = reconstruction_psnr(vae, images[:: max(1, len(images) // 200)], device)
    print(f"Autoencoder: PSNR {psnr:.2f} dB, scaling_factor {vae.config.scaling_factor:.4f}")

    model = train_teacher(
        "fashion_teacher",
        TextToLatent(emoji.text_encoder, emoji.transformer),
        latents.unsqueeze(1),
        lambda number, rng: rng.choice(captions_of(concepts[number])),
        emoji.tokenizer,
        args.max_train_steps,
        args,
        device,
    )
    save_pipeline(model, vae, emoji.tokenizer, args.output_dir)

    evaluation = write_data(images, concepts, args.output_dir, args.seed)
    features = MobileNetFeatures().to(device).extract([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images])
    FeatureReference.fit(features, concepts).save(args.output_dir / REFERENCE_FILE)
    meter, pipeline = Meter(args.output_dir), SanaPipeline.from_pretrained(args.output_dir).to(device)
    prompts, prompted = [item.prompt for item in evaluation], [item.concept for item in evaluation]
    results = {f"{steps} steps": meter(draw(pipeline, prompts, steps), prompted) for steps in STEPS}
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    record = {"autoencoder PSNR (dB)": round(psnr, 2), "results": results, "flags": flags, "device": device.type}
    (args.output_dir / "measurements.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"Saved {args.output_dir}\n{json.dumps(record, indent=2)}")


if __name__ == "__main__":
    main()
