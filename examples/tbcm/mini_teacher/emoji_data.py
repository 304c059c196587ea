"""Captioned emoji from two npm packages: pictures on white, concepts, styles and caption phrasings.

Run from the checkout, it writes the pictures that the embedded teacher was taught, with all their captions, as a
folder that `datasets` reads:

    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    mkdir noto fluent
    tar -xzf emoji-datasource-google-16.0.0.tgz -C noto --strip-components 1
    tar -xzf lobehub-fluent-emoji-3d-1.1.0.tgz -C fluent --strip-components 1
    python -m examples.tbcm.mini_teacher.emoji_data --noto_dir noto --fluent_dir fluent --output_dir pictures
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_tbcm.command_line import DEBUG_HELP, CommandParser, ending_in_words
from diffusers_tbcm.images import to_rgb


RESOLUTION = 64
# The concepts the teacher learns, by emoji.json's subcategory; every other picture helps the autoencoder only.
CONCEPT_SUBCATEGORIES = (
    "animal-", "plant-", "food-", "drink", "musical-instrument", "transport-", "place-geographic",
)  # fmt: skip
CAPTIONS = {
    "noto": ("noto {c}", "noto emoji {c}", "a noto emoji of {a}", "{a} in noto style", "{c}, noto"),
    "fluent": ("a fluent 3d emoji of {a}", "fluent 3d {c}", "fluent {c}", "{a} in fluent 3d style", "{c}, fluent 3d"),
}
STYLELESS_CAPTIONS = ("{c}", "an emoji of {a}", "{c} emoji")
ALIAS_PROBABILITY = 0.25
HELD_OUT_PAIRS = 100


@dataclass
class Emoji:
    """One picture: concept, style and file; `in_teacher` if the teacher may learn it, `held_out` if nothing may."""

    concept: str
    alias: str
    style: str
    file: Path
    in_teacher: bool
    held_out: bool = False

    @property
    def taught(self) -> bool:
        return self.in_teacher and not self.held_out


def list_emoji(noto_dir: Path, fluent_dir: Path, seed: int) -> list[Emoji]:
    """Join both packages on the code points of emoji.json; hold out pairs whose concept stays in the other style."""
    entries = json.loads((noto_dir / "emoji.json").read_text(encoding="utf-8"))
    entries = [e for e in entries if e["category"] not in ("Flags", "Component", "People & Body")]
    names = {e["name"].lower() for e in entries}
    pictures = []
    for entry in entries:
        concept = entry["name"].lower()
        alias = entry["short_name"].replace("_", " ").replace("-", " ")
        if alias in names or any(ch.isdigit() for ch in alias):
            alias = concept
        codes = [code.lower() for code in (entry["unified"], entry["non_qualified"]) if code]
        files = {
            "noto": [noto_dir / "img/google/64" / entry["image"]],
            "fluent": [fluent_dir / "assets" / f"{code}.webp" for code in codes],
        }
        found = {style: next((f for f in paths if f.exists()), None) for style, paths in files.items()}
        in_teacher = entry["subcategory"].startswith(CONCEPT_SUBCATEGORIES) and all(found.values())
        pictures += [Emoji(concept, alias, s, f, in_teacher) for s, f in found.items() if f is not None]

    rng = random.Random(seed)
    concepts = sorted({p.concept for p in pictures if p.in_teacher})
    held_out = {(concept, rng.choice(sorted(CAPTIONS))) for concept in rng.sample(concepts, HELD_OUT_PAIRS)}
    for picture in pictures:
        picture.held_out = (picture.concept, picture.style) in held_out
    return pictures


def load_images(pictures: list[Emoji]) -> torch.Tensor:
    """Pictures on white as uint8, (N, 3, RESOLUTION, RESOLUTION)."""
    images = []
    for picture in tqdm(pictures, desc="Reading pictures"):
        image = to_rgb(Image.open(picture.file))
        images.append(np.array(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1.0


def caption(template: str, name: str) -> str:
    article = "an" if name[0] in "aeiou" else "a"
    return template.format(c=name, a=f"{article} {name}")


def random_caption(picture: Emoji, rng: random.Random, styleless_probability: float) -> str:
    templates = STYLELESS_CAPTIONS if rng.random() < styleless_probability else CAPTIONS[picture.style]
    return caption(rng.choice(templates), picture.alias if rng.random() < ALIAS_PROBABILITY else picture.concept)


def all_captions(picture: Emoji) -> list[str]:
    templates = (*CAPTIONS[picture.style], *STYLELESS_CAPTIONS)
    return [caption(template, name) for template in templates for name in sorted({picture.concept, picture.alias})]


def write_image_folder(images: torch.Tensor, captions: list[list[str]], folder: Path) -> None:
    """Save (N, 3, H, W) uint8 as PNG files beside a metadata.jsonl whose `text` lists all captions of each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, texts) in enumerate(zip(images, captions, strict=True)):
        name = f"{number:05d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": texts}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--noto_dir", type=Path, required=True, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("--fluent_dir", type=Path, required=True, help="unpacked npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="the teacher's, which chooses what is held out")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    args = parser.parse_args(argv)
    with ending_in_words({}, debug=args.debug):
        taught = [picture for picture in list_emoji(args.noto_dir, args.fluent_dir, args.seed) if picture.taught]
        write_image_folder(load_images(taught), [all_captions(picture) for picture in taught], args.output_dir)
        print(f"{len(taught)} pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
