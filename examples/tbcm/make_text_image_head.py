#!/usr/bin/env python
"""Train the text-image head of the embedded teacher: does a picture show what its prompt says, style included?

Where no CLIP can be downloaded, this stands in for it, for emoji only: two linear maps, from MobileNet features and
from the teacher's text encoder, are trained to agree on the pictures and captions that the teacher was trained on.
Every picture is seen plain, mirrored, shifted, blurred and through the teacher's autoencoder, so that the score is of
what is shown and not of its sharpness. The pairs of concept and style that the teacher never saw measure it; the file
says how well it does on them.

    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0    # then unpack both
    python examples/tbcm/make_text_image_head.py --noto_dir ... --fluent_dir ...
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SanaPipeline
from emoji_data import (
    CAPTIONS,
    Emoji,
    all_captions,
    caption,
    list_emoji,
    load_images,
    random_caption,
    to_model_range,
)
from emoji_metrics import TEACHER_DIR
from tqdm.auto import trange

from diffusers_tbcm.features import MobileNetFeatures
from diffusers_tbcm.text_image import HEAD_FILE, TextImageHead, pooled_text


SIZE = 128  # of the common space
STYLELESS_PROBABILITY = 0.4
TEMPERATURE = 0.05
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


def train(
    features: torch.Tensor, pictures: list[Emoji], teacher: SanaPipeline, args: argparse.Namespace
) -> TextImageHead:
    """CLIP's loss over concepts in all of their styles, with several right answers where a caption has them."""
    concepts = sorted({p.concept for p in pictures})
    by_concept = {concept: [i for i, p in enumerate(pictures) if p.concept == concept] for concept in concepts}
    texts = {text: place for place, text in enumerate(sorted({t for p in pictures for t in all_captions(p)}))}
    text_features = pooled_text(list(texts), teacher.tokenizer, teacher.text_encoder)
    head = TextImageHead(features.shape[-1], teacher.text_encoder.config.hidden_size, SIZE)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.max_train_steps)
    rng = random.Random(args.seed)
    for step in (bar := trange(args.max_train_steps, desc="Text-image head", mininterval=5)):
        index = [i for concept in rng.sample(concepts, args.train_batch_size) for i in by_concept[concept]]
        batch = [pictures[i] for i in index]
        captions = [random_caption(picture, rng, STYLELESS_PROBABILITY) for picture in batch]
        version = torch.tensor([rng.randrange(len(features)) for _ in index])
        logits = head(features[version, torch.tensor(index)], text_features[[texts[text] for text in captions]])
        right = matches(batch, captions).float()
        loss = sum(
            F.cross_entropy(side / TEMPERATURE, answer / answer.sum(dim=1, keepdim=True))
            for side, answer in ((logits, right), (logits.T, right.T))
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return head.eval()


@torch.no_grad()
def accuracy(
    head: TextImageHead, features: torch.Tensor, pictures: list[Emoji], teacher: SanaPipeline
) -> dict[str, float]:
    """How often the caption of held-out pictures is found among those of every concept in both styles."""
    concepts = sorted({p.concept for p in pictures})
    candidates = [(concept, style) for concept in concepts for style in sorted(CAPTIONS)]
    texts = [caption(CAPTIONS[style][0], concept) for concept, style in candidates]
    similarity = head(features, pooled_text(texts, teacher.tokenizer, teacher.text_encoder))
    held_out = [i for i, p in enumerate(pictures) if p.held_out]
    nearest = similarity[held_out].topk(5, dim=1).indices.tolist()
    found = [[candidates[i] for i in row] for row in nearest]
    asked = [(pictures[i].concept, pictures[i].style) for i in held_out]
    rows = list(zip(found, asked, strict=True))
    share = 1 / len(rows)
    return {
        "pictures": len(rows),
        "captions": len(texts),
        "top-1": round(share * sum(row[0] == pair for row, pair in rows), 3),
        "top-5": round(share * sum(pair in row for row, pair in rows), 3),
        "top-1 concept": round(share * sum(row[0][0] == pair[0] for row, pair in rows), 3),
        "top-1 style": round(share * sum(row[0][1] == pair[1] for row, pair in rows), 3),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto_dir", type=Path, required=True, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("--fluent_dir", type=Path, required=True, help="unpacked npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--teacher_dir", type=Path, default=TEACHER_DIR, help="gets the head beside its text encoder")
    parser.add_argument("--seed", type=int, default=0, help="that of the teacher, which holds out the same pairs")
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--train_batch_size", type=int, default=64, help="concepts")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    pictures = [p for p in list_emoji(args.noto_dir, args.fluent_dir, args.seed) if p.in_teacher]
    teacher = SanaPipeline.from_pretrained(args.teacher_dir)
    features = image_features(load_images(pictures), teacher)
    taught = [i for i, p in enumerate(pictures) if p.taught]
    head = train(features[:, taught], [pictures[i] for i in taught], teacher, args)
    held_out = accuracy(head, features[0], pictures, teacher)
    head.save(args.teacher_dir / HEAD_FILE, held_out)
    print(f"{args.teacher_dir / HEAD_FILE}: {held_out}")


if __name__ == "__main__":
    main()
