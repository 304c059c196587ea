"""What people would prefer, by networks trained on their choices: PickScore, HPSv2, ImageReward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BertTokenizerFast,
    BlipTextConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizerFast,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..components import read_object
from ..errors import loading, loading_by_name
from ..text import check_tokenizer
from .features import pictures_to_tensor
from .picture_folder import digest_weights
from .published_weights import blip_vision_config, blip_weights, clip_weights
from .text_image import MAX_CLIP_TOKENS, CLIPScorer, HeadScorer, TextImageScorer, load_clip, look_and_read, pairs


PICKSCORE = "yuvalkirstain/PickScore_v1"
HPSV2 = "xswu/HPSv2"
HPSV2_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}  # by version
IMAGE_REWARD = "THUDM/ImageReward"
IMAGE_REWARD_FILE = "ImageReward.pt"
IMAGE_REWARD_TEXT = "med_config.json"
IMAGE_REWARD_MEAN, IMAGE_REWARD_STD = 0.16717362830052426, 1.0333394966054072  # of its rewards, as published
MAX_IMAGE_REWARD_TOKENS = 35
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # what PickScore and HPSv2 were tuned from
BERT = "google-bert/bert-base-uncased"  # whose words ImageReward reads
CONFIG = "config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BATCH = 16


class PickScorer:
    """PickScore (Kirstain et al., 2023): the scaled cosine of picture and prompt in a CLIP tuned on users' choices.

    Args:
        model: folder or Hub id.
        device: where it runs.

    Raises:
        ValueError: where the model is not found, or cannot be loaded.
    """

    name = "PickScore"

    def __init__(self, model: str | PathLike[str] = PICKSCORE, device: torch.device | str = "cpu") -> None:
        self.model, self.processor = load_clip("PickScore model", model, device)
        self.digest = digest_weights(self.model)

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image], prompts: Sequence[str], batch_size: int = BATCH) -> Tensor:
        """Score pictures against their prompts.

        Args:
            pictures: N pictures of any size.
            prompts: theirs, N texts; what goes beyond CLIP's 77 tokens is not read.
            batch_size: pictures at a time.

        Returns:
            (N,), about 20, on the CPU.
        """
        scores = []
        for batch in pairs(pictures, prompts, batch_size):
            outputs = look_and_read(self.model, self.processor, *batch)
            scores.append(outputs.logits_per_image.diagonal().float().cpu())
        return torch.cat(scores)


class HPSv2Scorer:
    """HPSv2 (Wu et al., 2023): 100 times the cosine of picture and prompt in a CLIP tuned on people's choices.

    The published weights are those of an `open_clip` model; here they are a `CLIPModel`'s.

    Args:
        model: folder or Hub id that holds `HPS_v2.1_compressed.pt`. Where a folder has the `config.json` and the
            tokenizer of CLIP ViT-H/14, too, nothing is looked for on the Hub.
        version: `"2.1"` or `"2.0"`; their scores are not comparable.
        device: where it runs.

    Raises:
        ValueError: where the weights are not found, or are not those of the model.
    """

    def __init__(
        self, model: str | PathLike[str] = HPSV2, version: str = "2.1", device: torch.device | str = "cpu"
    ) -> None:
        self.name = f"HPSv{version}"
        file = _weights_file("HPSv2 model", model, HPSV2_FILES[version])
        base = str(model) if (Path(model) / CONFIG).is_file() else CLIP_H
        with loading_by_name("CLIP model", base, "a folder"):
            config = CLIPConfig.from_pretrained(base)
            self.tokenizer = CLIPTokenizerFast.from_pretrained(base)
        with loading("HPSv2 weights", file):
            self.model = CLIPModel(config)
            weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
            self.model.load_state_dict(clip_weights(weights))
        self.model.eval().to(device)
        check_tokenizer(self.tokenizer, self.model.text_model)
        self.size: int = config.vision_config.image_size
        self.digest = digest_weights(self.model)

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image], prompts: Sequence[str], batch_size: int = BATCH) -> Tensor:
        """Score pictures against their prompts.

        Args:
            pictures: N pictures of any size; what is not square gets a black margin, as in HPSv2's own code.
            prompts: theirs, N texts; what goes beyond CLIP's 77 tokens is not read.
            batch_size: pictures at a time.

        Returns:
            (N,), about 25 to 30, on the CPU.
        """
        scores = []
        for images, texts in pairs(pictures, prompts, batch_size):
            pixels = torch.cat([_in_a_square(pictures_to_tensor([image]), self.size) for image in images])
            tokens = self.tokenizer(
                texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_CLIP_TOKENS
            )
            outputs = self.model(
                pixel_values=_normalised(pixels).to(self.model.device), **tokens.to(self.model.device)
            )
            scores.append(100 * F.cosine_similarity(outputs.image_embeds, outputs.text_embeds).float().cpu())
        return torch.cat(scores)


class ImageRewardScorer:
    """ImageReward (Xu et al., 2023): a reward that BLIP's text encoder reads off a picture and its prompt.

    Its own package needs a transformers of 2023. Here its published weights are those of transformers' BLIP.

    Args:
        model: folder or Hub id that holds `ImageReward.pt` and `med_config.json`. Where a folder has the `vocab.txt`
            of bert-base-uncased, too, nothing is looked for on the Hub.
        device: where it runs.

    Raises:
        ValueError: where the weights are not found, or are not those of the model.
    """

    name = "ImageReward"

    def __init__(self, model: str | PathLike[str] = IMAGE_REWARD, device: torch.device | str = "cpu") -> None:
        file = _weights_file("ImageReward model", model, IMAGE_REWARD_FILE)
        text = _weights_file("ImageReward model", model, IMAGE_REWARD_TEXT)
        words = str(model) if (Path(model) / "vocab.txt").is_file() else BERT
        with loading_by_name("tokenizer", words, "a folder"):
            self.tokenizer = BertTokenizerFast.from_pretrained(words)
        with loading("ImageReward weights", file):
            weights = blip_weights(torch.load(file, map_location="cpu", weights_only=True))
            self.vision = BlipVisionModel(blip_vision_config(weights["vision"]))
            self.vision.load_state_dict(weights["vision"])
            read = {**read_object(text), "encoder_hidden_size": self.vision.config.hidden_size, "is_decoder": True}
            self.text = BlipTextModel(BlipTextConfig(**read), add_pooling_layer=False)
            self.text.load_state_dict(weights["text"])
            shapes = [weight.shape for weight in weights["head"].values() if weight.ndim == 2]
            # Without activations, as it was published
            self.head = nn.Sequential(*(nn.Linear(inputs, outputs) for outputs, inputs in shapes))
            self.head.load_state_dict(weights["head"])
        for network in (self.vision, self.text, self.head):
            network.eval().to(device)
        self.device = torch.device(device)
        check_tokenizer(self.tokenizer, self.text)
        self.digest = digest_weights(self.vision, self.text, self.head)

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image], prompts: Sequence[str], batch_size: int = BATCH) -> Tensor:
        """Score pictures against their prompts.

        Args:
            pictures: N pictures of any size, of which the middle square is looked at.
            prompts: theirs, N texts; what goes beyond 35 tokens is not read.
            batch_size: pictures at a time.

        Returns:
            (N,), of mean 0 and deviation 1 over the pictures that it was made with, on the CPU.
        """
        scores, size = [], self.vision.config.image_size
        for images, texts in pairs(pictures, prompts, batch_size):
            pixels = pictures_to_tensor([_middle(image, size) for image in images])
            seen = self.vision(_normalised(pixels).to(self.device)).last_hidden_state
            tokens = self.tokenizer(
                texts, return_tensors="pt", padding="max_length", truncation=True, max_length=MAX_IMAGE_REWARD_TOKENS
            ).to(self.device)
            read = self.text(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
            )
            reward = self.head(read.last_hidden_state[:, 0]).squeeze(1)
            scores.append(((reward - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD).float().cpu())
        return torch.cat(scores)


def load_scorers(
    *,
    clip_model: str | None = None,
    text_image_head: str | None = None,
    pickscore_model: str | None = None,
    hpsv2_model: str | None = None,
    hpsv2_version: str = "2.1",
    image_reward_model: str | None = None,
    device: torch.device | str = "cpu",
) -> list[TextImageScorer]:
    """Load every scorer whose model is given.

    Args:
        clip_model, text_image_head, pickscore_model, hpsv2_model, image_reward_model: folder or Hub id; None for none.
        hpsv2_version: of HPSv2's weights.
        device: where they run.

    Returns:
        The scorers.

    Raises:
        ValueError: where a model is not found, or cannot be loaded.
    """
    scorers: list[TextImageScorer] = []
    if clip_model is not None:
        scorers.append(CLIPScorer(clip_model, device))
    if text_image_head is not None:
        scorers.append(HeadScorer(text_image_head, device))
    if pickscore_model is not None:
        scorers.append(PickScorer(pickscore_model, device))
    if hpsv2_model is not None:
        scorers.append(HPSv2Scorer(hpsv2_model, hpsv2_version, device))
    if image_reward_model is not None:
        scorers.append(ImageRewardScorer(image_reward_model, device))
    return scorers


def _weights_file(what: str, model: str | PathLike[str], name: str) -> Path:
    """A file of a folder, or of a repository on the Hub."""
    if Path(model).is_dir():
        if not (Path(model) / name).is_file():
            raise ValueError(f"{what} {str(model)!r} has no {name}")
        return Path(model) / name
    with loading_by_name(what, model, "a folder"):
        return Path(hf_hub_download(str(model), name))


def _normalised(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as CLIP was trained with them."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def _in_a_square(pixels: Tensor, size: int) -> Tensor:
    """A picture (1, 3, H, W) whose longer side is `size`, with a black margin to a square."""
    height, width = pixels.shape[-2:]
    if max(height, width) == size == min(height, width):
        return pixels
    new = tuple(round(side * size / max(height, width)) for side in (height, width))
    pixels = F.interpolate(pixels, size=new, mode="bicubic", antialias=True)
    down, right = size - new[0], size - new[1]
    return F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))


def _middle(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture whose shorter side is `size`."""
    width, height = picture.size
    short = min(width, height)
    resized = picture.resize((width * size // short, height * size // short), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return resized.crop((left, top, left + size, top + size))
