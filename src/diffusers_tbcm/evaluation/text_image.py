"""How well pictures show what their prompts say: CLIP, or offline a small head for one pipeline's pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, CLIPModel, CLIPProcessor

from ..errors import loading, loading_by_name
from ..files import written_beside
from ..images import to_rgb
from ..text import check_tokenizer
from ..transfer import load_whole
from .features import FeatureExtractor, MobileNetFeatures
from .picture_folder import digest_weights


HEAD_FILE = "text_image_head.safetensors"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
MAX_CLIP_TOKENS = 77


class TextImageScorer(Protocol):
    """Scores pictures against their prompts, as `CLIPScorer` does.

    Attributes: `name` of the score; `digest`, 16 digits that tell its weights from others.
    """

    name: str
    digest: str

    def __call__(self, pictures: Iterable[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Give (N,) scores of N pictures."""
        ...


class CLIPScorer:
    """100 times the cosine similarity of a picture and its prompt in CLIP (Hessel et al., 2021), 0 where negative.

    Args:
        model: folder or Hub id of a CLIP model.
        device: where it runs.

    Raises:
        ValueError: where the model is not found, or cannot be loaded.
    """

    name = "CLIP score"

    def __init__(self, model: str | PathLike[str] = DEFAULT_CLIP, device: torch.device | str = "cpu") -> None:
        self.model, self.processor = load_clip("CLIP model", model, device)
        self.digest = digest_weights(self.model)

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image], prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Score pictures against their prompts.

        Args:
            pictures: N pictures of any size.
            prompts: theirs, N texts; what goes beyond CLIP's 77 tokens is not read.
            batch_size: pictures at a time.

        Returns:
            (N,), 0 to 100, on the CPU.
        """
        scores = []
        for batch in pairs(pictures, prompts, batch_size):
            outputs = look_and_read(self.model, self.processor, *batch)
            similarity = F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
            scores.append(100 * similarity.clamp(min=0).cpu())
        return torch.cat(scores)


def load_clip(what: str, model: str | PathLike[str], device: torch.device | str) -> tuple[CLIPModel, CLIPProcessor]:
    """Load a CLIP and what makes its inputs.

    Args:
        what: it is to be, for messages.
        model: folder or Hub id.
        device: where it runs.

    Returns:
        Both.

    Raises:
        ValueError: where the model is not found, cannot be loaded, or its tokenizer reads no prompt.
    """
    with loading_by_name(what, model, "a folder"):
        network = load_whole(CLIPModel, str(model)).eval().to(device)
        processor = CLIPProcessor.from_pretrained(str(model))
    check_tokenizer(processor.tokenizer, network.text_model)
    return network, processor


def look_and_read(model: CLIPModel, processor: CLIPProcessor, pictures: list[Image.Image], texts: list[str]) -> Any:
    """Give pictures and texts to a CLIP, each cut to what it takes.

    Args:
        model, processor: as `load_clip` gives them.
        pictures: B pictures, RGB.
        texts: B texts.

    Returns:
        The model's outputs.
    """
    inputs = processor(
        text=texts,
        images=pictures,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=MAX_CLIP_TOKENS,
    )
    return model(**inputs.to(model.device))


def pairs(
    pictures: Iterable[Image.Image], prompts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[Image.Image], list[str]]]:
    """Take pictures and their prompts in batches.

    Args:
        pictures: N pictures, which need not be in memory.
        prompts: theirs, N texts.
        batch_size: at a time.

    Yields:
        Pictures in RGB, and their prompts.
    """
    pictures = iter(pictures)
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        yield [to_rgb(picture) for picture in islice(pictures, len(texts))], texts


class TextImageHead(nn.Module):
    """Two linear maps, from image features and from pooled text embeddings, into one space, trained as CLIP is.

    Unlike `FeatureReference.retrieval_at_k`, which looks for the prompted concept among labelled pictures, it needs no
    label and reads the whole prompt, its style included.

    Args:
        image_features: dimensions of the image features.
        text_features: dimensions of the text embeddings.
        size: dimensions of the common space.
    """

    def __init__(self, image_features: int, text_features: int, size: int) -> None:
        super().__init__()
        self.image = nn.Linear(image_features, size)
        self.text = nn.Linear(text_features, size)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Compare every picture with every text.

        Args:
            image_features: (N, D).
            text_features: (M, E).

        Returns:
            (N, M), cosine similarities.
        """
        return F.normalize(self.image(image_features), dim=-1) @ F.normalize(self.text(text_features), dim=-1).T

    def save(self, path: str | PathLike[str], accuracy: Mapping[str, Any]) -> None:
        """Write the head as one file, in float16.

        Args:
            path: the file.
            accuracy: what it was measured to be, on pictures that it was not trained on too, JSON values by name.
        """
        weights = {name: weight.half().contiguous() for name, weight in self.state_dict().items()}
        with written_beside(path) as partial:
            save_file(weights, partial, metadata={"accuracy": json.dumps(accuracy)})


class HeadScorer:
    """The score of a `TextImageHead`: 100 times its cosine similarity of a picture and its prompt, 0 where negative.

    It knows the pictures and prompts of one pipeline, and can be compared with no CLIP score.

    Args:
        folder: pipeline folder that holds `text_image_head.safetensors`, and the text encoder that the head reads.
        device: where it runs.

    Raises:
        ValueError: where the folder has no head, or one that is torn or not finite, or its tokenizer reads no prompt.
    """

    name = "text-image head score"

    def __init__(self, folder: str | PathLike[str], device: torch.device | str = "cpu") -> None:
        path = Path(folder) / HEAD_FILE
        if not path.is_file():
            raise ValueError(f"folder {str(folder)!r} has no {HEAD_FILE}")
        with loading("text-image head", path), safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name).float() for name in file.keys()}
            self.accuracy: dict[str, Any] = json.loads(file.metadata()["accuracy"])
            size, image_features = weights["image.weight"].shape
            self.head = TextImageHead(image_features, weights["text.weight"].shape[1], size)
            self.head.load_state_dict(weights)
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError(f"text-image head {str(path)!r} holds weights that are not finite")
        self.head.eval().to(device)
        self.extractor: FeatureExtractor = MobileNetFeatures().to(device)
        with loading("text encoder", folder):
            self.tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
            self.text_encoder = load_whole(AutoModel, Path(folder) / "text_encoder").eval().to(device)
        check_tokenizer(self.tokenizer, self.text_encoder)
        self.digest = digest_weights(self.head, self.extractor, self.text_encoder)

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image], prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Score pictures against their prompts.

        Args:
            pictures: N pictures of any size.
            prompts: theirs, N texts.
            batch_size: pictures and prompts at a time.

        Returns:
            (N,), 0 to 100, on the CPU.
        """
        device = self.text_encoder.device
        images = self.extractor.extract(pictures, batch_size).split(batch_size)
        texts = pooled_text(prompts, self.tokenizer, self.text_encoder, batch_size).split(batch_size)
        scores = [
            self.head(image.to(device), text.to(device)).diagonal().cpu()
            for image, text in zip(images, texts, strict=True)
        ]
        return 100 * torch.cat(scores).clamp(min=0)


@torch.no_grad()
def pooled_text(prompts: Sequence[str], tokenizer: Any, text_encoder: nn.Module, batch_size: int = 64) -> Tensor:
    """Embed texts as the mean over their tokens.

    Args:
        prompts: N texts.
        tokenizer: of the text encoder.
        text_encoder: gives token embeddings as its first output.
        batch_size: texts at a time.

    Returns:
        (N, E), on the CPU.
    """
    device, pooled = next(text_encoder.parameters()).device, []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt").to(device)
        mask = inputs["attention_mask"].unsqueeze(-1)
        tokens = text_encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        pooled.append(((tokens * mask).sum(dim=1) / mask.sum(dim=1)).float().cpu())
    return torch.cat(pooled)
