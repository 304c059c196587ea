"""A student is judged by its teacher's own pictures of the same prompts, from other noises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .metrics import KERNEL_SUBSETS, Estimate, bootstrap, diversity, frechet_distance, kernel_distance
from .reference import FeatureReference


COMPONENTS = 48  # of the features: the covariance of some hundred pictures has full rank


class TeacherJudge:
    """Compares features of pictures with those of a teacher's pictures.

    All features are of the same prompts, in rounds: a picture of every prompt, then another of every prompt. A round
    is what intervals are resampled by; with one picture a prompt, each is a round.

    Args:
        teacher: (R * P, D), features of the teacher's pictures.
        round_size: P, prompts of a round.
        real: real pictures that show what prompts ask for; None where there are none.
        labels: what each picture's prompt asks for, R * P names of `real`.

    Attributes:
        reference: the teacher's pictures.
        real: as given.
    """

    def __init__(
        self,
        teacher: Tensor,
        round_size: int,
        *,
        real: FeatureReference | None = None,
        labels: Sequence[str] = (),
        num_components: int = COMPONENTS,
    ) -> None:
        different = round_size if round_size > 1 else len(teacher)
        self._prompts = [f"prompt {place % different}" for place in range(len(teacher))]
        self.reference = FeatureReference.fit(teacher, num_components=num_components)
        self.round_size, self.real, self.labels = round_size, real, labels
        self._teachers_diversity = self._diversity(teacher)

    def distance(self, features: Tensor, other: Tensor | None = None) -> Estimate:
        """Measure the Frechet distance to the teacher's pictures.

        Args:
            features: (R * P, D).
            other: those of others from the same noises; then the difference of the two distances is measured.

        Returns:
            The distance, or how much larger it is than the other, with a 95% interval.
        """
        sets = [
            self.reference.project(each).unflatten(0, (-1, self.round_size))
            for each in (features, other)
            if each is not None
        ]
        distance = partial(frechet_distance, *self.reference.gaussian)

        def statistic(index: Tensor) -> float:
            first, *rest = (distance(each[index].flatten(0, 1)) for each in sets)
            return first - sum(rest)

        return bootstrap(statistic, len(sets[0]))

    def kernel_distance(self, features: Tensor) -> Estimate:
        """Measure the kernel distance to the teacher's pictures.

        Args:
            features: (R * P, D).

        Returns:
            The distance, with a 95% interval over prompts.
        """
        return kernel_distance(
            self.reference.features,
            features,
            prompts=self._prompts,
            real_prompts=self._prompts,
            subsets=min(KERNEL_SUBSETS, len({*self._prompts})),
        )

    def diversity(self, features: Tensor) -> float:
        """Measure how much the pictures of a prompt differ.

        Args:
            features: (R * P, D).

        Returns:
            A mean over prompts, over the teacher's; NaN where each prompt has one picture.
        """
        return self._diversity(features) / self._teachers_diversity

    def retrieval(self, features: Tensor) -> float:
        """Measure how often one of the 5 nearest real pictures shows what the prompt asks for.

        Args:
            features: (R * P, D).

        Returns:
            A share of the pictures.

        Raises:
            ValueError: where no real pictures were given.
        """
        if self.real is None:
            raise ValueError("real is None: retrieval takes real pictures")
        return self.real.retrieval_at_k(features, self.labels, k=5)

    def _diversity(self, features: Tensor) -> float:
        if self.round_size == 1:
            return math.nan
        return diversity(features.unflatten(0, (-1, self.round_size)).transpose(0, 1)).mean().item()
