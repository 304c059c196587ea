"""How good and how fast a pipeline is: its pictures against real ones, its prompts and its teacher; latency.

MobileNet-FD is a Frechet distance between image features of a small MobileNetV2. It ranks models on one reference set
and is not comparable with any FID, whose features are Inception's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import median

import torch
from PIL import Image
from torch import Tensor

from ..export.record import Measurement
from .features import FeatureExtractor, MobileNetFeatures, pictures_to_tensor
from .kept import features_of, scores_of
from .metrics import (
    KERNEL_SUBSETS,
    LEAST_SUBSETS,
    NEIGHBOURS,
    RESAMPLES,
    Estimate,
    bootstrap,
    decisiveness,
    diversity,
    frechet_distance,
    kernel_distance,
    mirror_products,
    within_balls,
)
from .reference import FeatureReference
from .text_image import TextImageScorer


__all__ = [
    "Evaluator",
    "FeatureReference",
    "MobileNetFeatures",
    "TextImageScorer",
    "pictures_to_tensor",
    "seconds_per_image",
]

PACKAGES = ("matplotlib", "pandas", "scipy", "torchmetrics")  # the eval extra's, beside what makes features
RETRIEVED = (1, 5)  # top-k retrieval is given for these k


def check_installed() -> None:
    """Miss a package that measuring takes before drawing for it.

    Raises:
        ImportError: naming the package.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise ImportError(f"evaluation needs {package}, which is not installed: pip install {package}")


def check_numbers(
    extractor: FeatureExtractor,
    *,
    labels: Sequence[str],
    drawn: int,
    real: int,
    real_labels: Sequence[str],
    by_label: bool = False,
) -> None:
    """Refuse what an `Evaluator` could not compare with real images, before it is drawn.

    Args:
        extractor: makes the features.
        labels: the prompted concepts; none where there are none.
        drawn: how many pictures a model draws.
        real: how many images they are compared with.
        real_labels: the concepts that those show; none where they are not known.
        by_label: the Frechet distance is to be measured for every concept apart.

    Raises:
        ValueError: where the pictures of one side or the prompts of a concept are too few, or a concept is that of no
            real image.
    """
    dimensions = extractor.num_components or extractor.num_features
    needed = 1 + max(dimensions, NEIGHBOURS, *RETRIEVED)
    for kind, number in (("drawn", drawn), ("real", real)):
        if number < needed:
            raise ValueError(
                f"{number} {kind} pictures are too few: the covariance of {extractor.frechet_name} takes {needed}"
            )
    unknown = sorted({*labels} - {*real_labels})
    if real_labels and unknown:
        raise ValueError(f"{len(unknown)} labels of prompts, such as {unknown[0]!r}, are those of no real picture")
    if not by_label:
        return
    if not labels or not real_labels:
        raise ValueError("a distance by label takes labels of both the prompts and the real pictures")
    prompts = Counter(labels)
    fewest = min(prompts, key=lambda label: prompts[label])
    if prompts[fewest] < 2:
        raise ValueError(f"there is 1 prompt of label {fewest!r}: the interval of its distance takes at least 2")
    each = drawn // len(labels)
    for kind, numbers, of_prompt in (("drawn", prompts, each), ("real", Counter(real_labels), 1)):
        fewest = min(prompts, key=lambda label: numbers[label])
        if numbers[fewest] * of_prompt <= dimensions:
            raise ValueError(
                f"{numbers[fewest] * of_prompt} {kind} pictures of label {fewest!r} are too few: the covariance of"
                f" {extractor.frechet_name} takes {dimensions + 1} of each label"
            )


@dataclass(frozen=True)
class Evaluator:
    """Measures a model's pictures, with intervals that say how far other prompts would change the figures.

    The intervals are bootstraps over prompts, the reference being given; that of the kernel distance is a jackknife.

    Args:
        extractor: makes the features.
        reference: the real images; None for no comparison with any.
        scorers: each scores pictures against prompts.
        resamples: of the bootstrap.
        by_label: measure the Frechet distance of every label apart, too: for few, such as MJHQ-30K's categories.
        others: further features and references, in which distances are measured, too.
    """

    extractor: FeatureExtractor
    reference: FeatureReference | None = None
    scorers: Sequence[TextImageScorer] = ()
    resamples: int = RESAMPLES
    by_label: bool = False
    others: Sequence[tuple[FeatureExtractor, FeatureReference]] = ()

    def __call__(
        self,
        model: str,
        num_inference_steps: int,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        labels: Sequence[str] = (),
        teacher: Sequence[Image.Image] | None = None,
    ) -> Measurement:
        """Measure pictures; features and scores of a `PictureFolder` are kept in it.

        Args:
            model: `"student"` or another name for the row.
            num_inference_steps: steps that were taken.
            pictures: M of every prompt, P * M in all, those of one prompt together; read twice.
            prompts: P >= 2 texts.
            labels: the prompted concepts, P names, for retrieval; none where the reference has none.
            teacher: the teacher's pictures of the same prompts from the same noises, P * M; None where there are none.

        Returns:
            The row: distances, precision, recall and retrieval with a reference, the score of every scorer, diversity
            where M is at least 2, decisiveness where the teacher's pictures are given. The kernel distance takes at
            least 3 different prompts.

        Raises:
            ValueError: where there is not one number of pictures for all prompts.
        """
        each = _pictures_per_prompt(pictures, prompts)
        features = features_of(self.extractor, pictures)
        found: dict[str, Estimate] = {}
        if self.reference is not None:
            found |= self._distances(self.extractor, self.reference, features, labels, prompts)
            found |= self._likeness(self.reference, features, _repeat(labels, each), len(prompts))
        for extractor, reference in self.others:
            others = features_of(extractor, pictures)
            found |= self._distances(extractor, reference, others, labels, prompts)
        for name, values in self._by_prompt(pictures, prompts, features).items():
            found[name] = self._mean(values, len(prompts))
        if teacher is not None:
            products = _mirror_products(pictures, teacher).view(len(prompts), each, 2).sum(dim=1)
            products = products[products[:, 1] > 0]  # of symmetric pictures, both are 0
            if len(products) > 1:
                found["decisiveness"] = self._bootstrap(lambda index: decisiveness(products[index]), len(products))
        return Measurement(
            model,
            num_inference_steps,
            {name: estimate.value for name, estimate in found.items()},
            {name: (estimate.low, estimate.high) for name, estimate in found.items()},
        )

    def by_prompt(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Measure what every prompt has a value of, to see which are badly drawn, or always alike.

        Args:
            pictures, prompts: as for the whole.

        Returns:
            (P,), float64, by name: the score of every scorer, the mean over the prompt's pictures, and diversity where
            M is at least 2.

        Raises:
            ValueError: as for the whole.
        """
        return self._by_prompt(pictures, prompts, features_of(self.extractor, pictures))

    def _by_prompt(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], features: Tensor
    ) -> dict[str, Tensor]:
        each, found = _pictures_per_prompt(pictures, prompts), {}
        for scorer in self.scorers:
            scores = scores_of(scorer, pictures, _repeat(prompts, each)).double()
            found[scorer.name] = scores.view(len(prompts), each).mean(dim=1)
        if each > 1:
            found["diversity"] = diversity(features.unflatten(0, (len(prompts), each)))
        return found

    def _distances(
        self,
        extractor: FeatureExtractor,
        reference: FeatureReference,
        features: Tensor,
        labels: Sequence[str],
        prompts: Sequence[str],
    ) -> dict[str, Estimate]:
        """How far apart the pictures and the real ones are, as a whole and label by label."""
        projected = reference.project(features).unflatten(0, (len(prompts), -1))
        different = len({*prompts})

        def frechet(mean: Tensor, root: Tensor, drawn: Tensor) -> Estimate:
            return self._bootstrap(lambda index: frechet_distance(mean, root, drawn[index].flatten(0, 1)), len(drawn))

        found = {extractor.frechet_name: frechet(*reference.gaussian, projected)}
        if different >= LEAST_SUBSETS:
            found[extractor.kernel_name] = kernel_distance(
                reference.features.float(),
                features,
                prompts=_repeat(prompts, projected.shape[1]),
                real_prompts=reference.prompts,
                subsets=min(KERNEL_SUBSETS, different),
            )
        for label in sorted({*labels}) if self.by_label and reference.labels else ():
            drawn = projected[[name == label for name in labels]]
            found[f"{extractor.frechet_name} ({label})"] = frechet(*reference.gaussian_of(label), drawn)
        return found

    def _likeness(
        self, reference: FeatureReference, features: Tensor, labels: Sequence[str], prompts: int
    ) -> dict[str, Estimate]:
        """How many pictures are like real ones, and the other way round."""
        real = reference.features.float()
        covered = within_balls(real, features).unflatten(1, (prompts, -1))
        found = {
            "precision": self._mean(within_balls(features, real).any(dim=1), prompts),
            "recall": self._bootstrap(
                lambda index: float(covered[:, index.unique()].flatten(1).any(dim=1).double().mean()), prompts
            ),
        }
        if reference.labels and labels:
            for k in RETRIEVED:
                found[f"top-{k} retrieval"] = self._mean(reference.hits_at_k(features, labels, k), prompts)
        return found

    def _mean(self, values: Tensor, prompts: int) -> Estimate:
        """The mean over pictures or prompts."""
        of_prompt = values.double().view(prompts, -1).mean(dim=1)
        return self._bootstrap(lambda index: float(of_prompt[index].mean()), prompts)

    def _bootstrap(self, statistic: Callable[[Tensor], float], prompts: int) -> Estimate:
        return bootstrap(statistic, prompts, resamples=self.resamples)


def compare_with_teacher(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Add to measurements their diversity as a share of the teacher's, which mode collapse makes small.

    Args:
        measurements: of students and of teachers, the last of which is the one compared with.

    Returns:
        The measurements; as they were where there is no teacher, or no diversity of it.
    """
    teachers = [row for row in measurements if row.model == "teacher"]
    if not teachers or not teachers[-1].metrics.get("diversity"):
        return list(measurements)
    of_teacher = teachers[-1].metrics["diversity"]
    return [
        replace(row, metrics={**row.metrics, "diversity / teacher's": row.metrics["diversity"] / of_teacher})
        for row in measurements
    ]


def _pictures_per_prompt(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> int:
    each, rest = divmod(len(pictures), len(prompts))
    if rest or not each:
        raise ValueError(f"pictures are {len(pictures)} for {len(prompts)} prompts: each takes equally many")
    return each


def _mirror_products(pictures: Sequence[Image.Image], teacher: Sequence[Image.Image]) -> Tensor:
    """`mirror_products` of every picture, two of which are in memory."""
    pairs = zip(pictures, teacher, strict=True)
    return torch.cat([mirror_products(*(pictures_to_tensor([picture]) for picture in pair)) for pair in pairs])


def _repeat(items: Sequence[str], times: int) -> list[str]:
    return [item for item in items for _ in range(times)]


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
