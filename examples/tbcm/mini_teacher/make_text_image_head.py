"""Train the text-image head of the embedded teacher: does a picture show what its prompt says, style included?

Where no CLIP can be downloaded, this stands in for it, for emoji only: two linear maps, from MobileNet features and
from the teacher's text encoder, are trained to agree on the pictures and captions that the teacher was trained on.
Every picture is seen plain, mirrored, shifted, blurred and through the teacher's autoencoder, so that the score is of
what is shown and not of its sharpness. The pairs of concept and style that the teacher never saw measure it; the file
says how well it does on them.

    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0    # then unpack both
    python -m examples.tbcm.mini_teacher.make_text_image_head --noto_dir ... --fluent_dir ...    # from the checkout
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SanaPipeline
from tqdm.auto import trange

from diffusers_tbcm.evaluation.features import MobileNetFeatures
from diffusers_tbcm.evaluation.text_image import HEAD_FILE, TextImageHead, pooled_text

from .emoji_data import (
    CAPTIONS,
    Emoji,
    all_captions,
    caption,
    list_emoji,
    load_images,
    random_caption,
    to_model_range,
)
from .emoji_metrics import TEACHER_DIR


SIZE = 256  # of the common space
STYLELESS_PROBABILITY = 0.4
TEMPERATURE = 0.1
RIDGE = 0.1  # of the whitening, as a share of the mean variance
SHIFT = 4  # pixels
BLUR = 40  # pixels a side that a picture is shrunk to and enlarged from


@torch.no_grad()
def image_features(images: torch.Tensor, teacher: SanaPipeline) -> torch.Tensor:
    """MobileNet features of every version of the pictures, (versions, N, 1280); the plain one first."""
    extractor = MobileNetFeatures()
    versions = []
    for mirrored in (False, True):
        plain = images.flip(3) if mirrored else images
        pixels = plain.float() / 255
        latents = [teacher.vae.encode(to_model_range(chunk)).latent for chunk in plain.split(64)]
        decoded = torch.cat([teacher.vae.decode(latent).sample for latent in latents]).clamp(-1, 1) / 2 + 0.5
        padded = F.pad(pixels, [SHIFT] * 4, value=1.0)
        shifts = [padded[..., y : y + 64, x : x + 64] for y, x in ((0, SHIFT), (2 * SHIFT, SHIFT), (SHIFT, 0))]
        small = F.interpolate(decoded, size=(BLUR, BLUR), mode="bilinear", antialias=True)
        blurred = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
        versions += [pixels, decoded, blurred, *shifts]
    return torch.stack([torch.cat([extractor(chunk) for chunk in version.split(64)]) for version in versions])


def matches(pictures: list[Emoji], captions: list[str]) -> torch.Tensor:
    """(N, M), bool: whether a picture is one that a caption means; a caption without a style means every style's."""
    meanings = [set(all_captions(picture)) for picture in pictures]
    return torch.tensor([[text in meaning for text in captions] for meaning in meanings])


def whitening(features: torch.Tensor, pictures: list[Emoji]) -> torch.nn.Linear:
    """Principal components, whitened by how a concept's own pictures differ: what is left tells concepts apart.

    On so few pictures a map learnt from nothing knows the training pictures by heart and the held-out ones less well.
    """
    mean, scale = features.mean((0, 1)), features.std((0, 1)) + 1e-3
    normal = (features - mean) / scale
    directions = torch.linalg.svd(normal[0], full_matrices=False)[2][:SIZE].T
    projected = normal @ directions
    within = torch.zeros(SIZE, SIZE)
    for concept in {p.concept for p in pictures}:
        own = projected[:, [p.concept == concept for p in pictures]].flatten(0, 1)
        within += (own - own.mean(dim=0)).T @ (own - own.mean(dim=0)) / (len(features) * len(pictures))
    within += RIDGE * within.trace() / SIZE * torch.eye(SIZE)
    matrix = directions @ torch.linalg.cholesky(torch.linalg.inv(within)) / scale[:, None]
    linear = torch.nn.Linear(features.shape[-1], SIZE)
    linear.weight.data = matrix.T.contiguous()
    linear.bias.data = -mean @ matrix
    return linear.requires_grad_(False)


def train(
    features: torch.Tensor, pictures: list[Emoji], teacher: SanaPipeline, args: argparse.Namespace
) -> TextImageHead:
    """CLIP's loss over concepts in all of their styles, with several right answers where a caption has them."""
    concepts = sorted({p.concept for p in pictures})
    by_concept = {concept: [i for i, p in enumerate(pictures) if p.concept == concept] for concept in concepts}
    texts = {text: place for place, text in enumerate(sorted({t for p in pictures for t in all_captions(p)}))}
    text_features = pooled_text(list(texts), teacher.tokenizer, teacher.text_encoder)
    white = whitening(features, pictures)
    white_features = white(features)
    head = TextImageHead(SIZE, text_features.shape[1], SIZE)
    # Start from every caption's least-squares guess of its pictures.
    torch.nn.init.eye_(head.image.weight)
    torch.nn.init.zeros_(head.image.bias)
    meant = matches(pictures, list(texts)).float()
    means = F.normalize(meant.T @ F.normalize(white_features, dim=-1).mean(dim=0), dim=-1)
    extended = F.pad(text_features, (0, 1), value=1.0)
    guess = torch.linalg.solve(extended.T @ extended + torch.eye(extended.shape[1]), extended.T @ means)
    head.text.weight.data, head.text.bias.data = guess[:-1].T.contiguous(), guess[-1].clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.max_train_steps)
    rng = random.Random(args.seed)
    for step in (bar := trange(args.max_train_steps, desc="Text-image head", mininterval=5)):
        index = [i for concept in rng.sample(concepts, args.train_batch_size) for i in by_concept[concept]]
        batch = [pictures[i] for i in index]
        captions = [random_caption(picture, rng, STYLELESS_PROBABILITY) for picture in batch]
        version = torch.tensor([rng.randrange(len(features)) for _ in index])
        image_features = white_features[version, torch.tensor(index)]
        logits = head(image_features, text_features[[texts[text] for text in captions]])
        right = matches(batch, captions).float()
        by_picture, by_caption = (
            F.cross_entropy(side / TEMPERATURE, answer / answer.sum(dim=1, keepdim=True))
            for side, answer in ((logits, right), (logits.T, right.T))
        )
        loss = by_picture + by_caption
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    # Two linear maps are one.
    folded = TextImageHead(features.shape[-1], text_features.shape[1], SIZE)
    folded.text = head.text
    folded.image.weight.data = head.image.weight.data @ white.weight
    folded.image.bias.data = head.image(white.bias).data
    return folded.eval()


@torch.no_grad()
def accuracy(
    head: TextImageHead, features: torch.Tensor, pictures: list[Emoji], teacher: SanaPipeline
) -> dict[str, Any]:
    """How often the caption of pictures is found among those of every concept in both styles."""
    concepts = sorted({p.concept for p in pictures})
    candidates = [(concept, style) for concept in concepts for style in sorted(CAPTIONS)]
    texts = [caption(CAPTIONS[style][0], concept) for concept, style in candidates]
    nearest = head(features, pooled_text(texts, teacher.tokenizer, teacher.text_encoder)).topk(5, dim=1).indices
    shares = {}
    for name, held_out in (("held-out pairs", True), ("trained pairs", False)):
        rows = [i for i, p in enumerate(pictures) if p.held_out == held_out]
        asked = [(pictures[i].concept, pictures[i].style) for i in rows]
        found = [[candidates[i] for i in row] for row in nearest[rows].tolist()]
        hits = {
            "top-1": [row[0] == pair for row, pair in zip(found, asked, strict=True)],
            "top-5": [pair in row for row, pair in zip(found, asked, strict=True)],
            "top-1 concept": [row[0][0] == pair[0] for row, pair in zip(found, asked, strict=True)],
            "top-1 style": [row[0][1] == pair[1] for row, pair in zip(found, asked, strict=True)],
        }
        shares[name] = {"pictures": len(rows), **{metric: round(sum(of) / len(of), 3) for metric, of in hits.items()}}
    return {"captions": len(texts), **shares}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto_dir", type=Path, required=True, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("--fluent_dir", type=Path, required=True, help="unpacked npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--teacher_dir", type=Path, default=TEACHER_DIR, help="gets the head beside its text encoder")
    parser.add_argument("--seed", type=int, default=0, help="that of the teacher, which holds out the same pairs")
    parser.add_argument("--max_train_steps", type=int, default=200)
    parser.add_argument("--train_batch_size", type=int, default=64, help="concepts")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=1.0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    pictures = [p for p in list_emoji(args.noto_dir, args.fluent_dir, args.seed) if p.in_teacher]
    teacher = SanaPipeline.from_pretrained(args.teacher_dir)
    features = image_features(load_images(pictures), teacher)
    taught = [i for i, p in enumerate(pictures) if p.taught]
    head = train(features[:, taught], [pictures[i] for i in taught], teacher, args)
    measured = accuracy(head, features[0], pictures, teacher)
    head.save(args.teacher_dir / HEAD_FILE, measured)
    print(f"{args.teacher_dir / HEAD_FILE}: {json.dumps(measured, indent=2)}")


if __name__ == "__main__":
    main()
