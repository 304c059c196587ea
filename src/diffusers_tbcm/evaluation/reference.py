"""The images that generated ones are measured against, as features: from a file, a folder, a data set or a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import loading
from ..files import written_beside
from .features import NUM_COMPONENTS
from .metrics import fit_gaussian, frechet_distance, symmetric_root


@dataclass(frozen=True)
class FeatureReference:
    """The real images that generated ones are measured against, kept as features.

    Args:
        features: (N, D), float16: what a reference file stores.
        labels: the concept that each image shows, N names, or none at all.
        mean: (D,), float64, mean of the features.
        components: (D, K), float64, their first K principal components, in which the Frechet distance is taken; None
            where it is taken in all dimensions.
        prompts: the prompt that each image is of, N texts; none at all where they are not known.
    """

    features: Tensor
    labels: tuple[str, ...]
    mean: Tensor
    components: Tensor | None
    prompts: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Sequence[str] = (),
        num_components: int | None = NUM_COMPONENTS,
        prompts: Sequence[str] = (),
    ) -> FeatureReference:
        """Make a reference of real images' features.

        Args:
            features: (N, D).
            labels: the concept that each image shows, N names; none where they are not known.
            num_components: K, the dimensions that the Frechet distance is taken in; None for all of them.
            prompts: the prompt that each image is of, N texts; none where they are not known.

        Returns:
            The reference.

        Raises:
            ValueError: where features and labels or prompts differ in number, features are not finite, or K components
                cannot be told from N images.
        """
        for name, texts in (("labels", labels), ("prompts", prompts)):
            if texts and len(features) != len(texts):
                raise ValueError(f"{name} has {len(texts)} names for {len(features)} features")
        if (num_components or features.shape[1]) > min(len(features) - 1, features.shape[1]):
            raise ValueError(
                f"num_components is {num_components or 'all'}, too many for features of shape {tuple(features.shape)}"
            )
        features = features.cpu().half()
        if not features.isfinite().all():
            raise ValueError("features holds NaN or infinity: of such images there is no distance")
        mean = features.double().mean(dim=0)
        if num_components is None:
            return cls(features, tuple(labels), mean, None, tuple(prompts))
        _, _, directions = torch.linalg.svd(features.double() - mean, full_matrices=False)
        return cls(features, tuple(labels), mean, directions[:num_components].T.contiguous(), tuple(prompts))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the reference as one safetensors file.

        Args:
            path: the file.
        """
        tensors = {"features": self.features, "mean": self.mean}
        if self.components is not None:
            tensors["components"] = self.components
        texts = {"labels": json.dumps(self.labels), "prompts": json.dumps(self.prompts)}
        with written_beside(path) as partial:
            save_file(tensors, partial, metadata=texts)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FeatureReference:
        """Read a reference that `save` wrote.

        Args:
            path: the file.

        Returns:
            The reference, bit for bit.

        Raises:
            ValueError: where the file is no such reference, or its numbers are not finite.
        """
        with loading("reference file", path), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            texts = file.metadata()
            labels, prompts = (tuple(json.loads(texts.get(name, "[]"))) for name in ("labels", "prompts"))
            found = cls(tensors["features"], labels, tensors["mean"], tensors.get("components"), prompts)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"reference file {str(path)!r} holds features that are not finite")
        for name, texts in (("labels", labels), ("prompts", prompts)):
            if texts and len(texts) != len(found.features):
                raise ValueError(
                    f"reference file {str(path)!r} has {len(texts)} {name} for {len(found.features)} features"
                )
        return found

    def project(self, features: Tensor) -> Tensor:
        """Give features as the Frechet distance sees them.

        Args:
            features: (M, D).

        Returns:
            (M, K), in the principal components, float64.
        """
        centred = features.cpu().double() - self.mean
        return centred if self.components is None else centred @ self.components

    @cached_property
    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean (K,) and root of the covariance (K, K) of the projected reference, for `metrics.frechet_distance`."""
        mean, covariance = fit_gaussian(self.project(self.features))
        return mean, symmetric_root(covariance)

    def gaussian_of(self, label: str) -> tuple[Tensor, Tensor]:
        """Mean (K,) and root of the covariance (K, K) of the projected images that show a concept.

        Args:
            label: the concept, of at least two images.

        Returns:
            Both, float64.
        """
        chosen = [name == label for name in self.labels]
        mean, covariance = fit_gaussian(self.project(self.features[chosen]))
        return mean, symmetric_root(covariance)

    def frechet_distance(self, features: Tensor) -> float:
        """Measure how far generated images are from the real ones, as distributions: MobileNet-FD, or FID.

        Args:
            features: (M, D), M >= 2, of generated images.

        Returns:
            The squared Frechet distance between Gaussians fitted to both in the reference's principal components.
        """
        return frechet_distance(*self.gaussian, self.project(features))

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
        return float(self.hits_at_k(features, labels, k).double().mean())

    def hits_at_k(self, features: Tensor, labels: Sequence[str], k: int) -> Tensor:
        """Say which generated images `retrieval_at_k` counts.

        Args:
            features: (M, D), of generated images.
            labels: the prompted concepts, M names.
            k: how many real images to look at.

        Returns:
            (M,), bool.

        Raises:
            ValueError: where features and labels differ in number.
        """
        if len(features) != len(labels):
            raise ValueError(f"labels has {len(labels)} names for {len(features)} features")
        real = F.normalize(self.features.float())
        hits = [
            any(self.labels[index] == label for index in (real @ row).topk(k).indices.tolist())
            for row, label in zip(F.normalize(features.cpu().float()), labels, strict=True)
        ]
        return torch.tensor(hits)
