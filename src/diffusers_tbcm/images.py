"""Pictures in pixels: the sizes that Sana was trained at, and the inputs of image-to-image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from PIL import Image


def resolution_bins(native_size: int, multiple: int) -> dict[str, list[int]]:
    """Scale the 1024-pixel sizes of Sana's training to another size.

    Args:
        native_size: pixels a side of the square picture.
        multiple: what every side has to be a multiple of, in pixels.

    Returns:
        Height and width in pixels by their ratio.
    """
    scale = native_size / 1024 / multiple
    return {
        ratio: [max(1, round(size * scale)) * multiple for size in sizes]
        for ratio, sizes in ASPECT_RATIO_1024_BIN.items()
    }


def load_image(image: PipelineImageInput, height: int, width: int, multiple: int) -> torch.Tensor:
    """Turn what diffusers takes for an image, or several, into a tensor that can become the wanted size.

    Args:
        image: PIL images, arrays (height, width, 3) or tensors (3, height, width) of floats in [0, 1]; one, a batch or
            a list.
        height: of the picture to make, in pixels.
        width: of the picture to make, in pixels.
        multiple: of pixels that sizes are rounded to: up to so many may be cut off.

    Returns:
        Pixels in [-1, 1], (images, 3, image height, image width), at the size that they came in.

    Raises:
        ValueError: for whole-number arrays, for other channels than red, green and blue, and for a picture that would
            be distorted or cropped.
    """
    first = image[0] if isinstance(image, list) else image
    if "int" in str(getattr(first, "dtype", "")):
        raise ValueError(f"`image` holds {first.dtype}, but has to hold floats in [0, 1] or be a PIL image.")
    pixels = VaeImageProcessor(do_resize=False, do_convert_rgb=True).preprocess(image)
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(
            f"`image` has the shape {tuple(pixels.shape)} of (images, channels, height, width), but has to have three"
            " channels: red, green and blue."
        )
    image_height, image_width = pixels.shape[2:]
    scale = max(height / image_height, width / image_width)
    if max(image_height * scale - height, image_width * scale - width) >= multiple:
        raise ValueError(
            f"`image` is {image_width} x {image_height} pixels (width x height), which does not fit the {width} x"
            f" {height} of the picture to make: crop it, or pass a `height` and `width` of its proportions."
        )
    return pixels


def fit_image(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize pictures until they cover a size, and cut off what is left over around the centre.

    Args:
        pixels: (images, channels, height, width).
        height: in pixels.
        width: in pixels.

    Returns:
        The pictures, (images, channels, `height`, `width`).
    """
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = [max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale))]
    if size != list(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, :, top : top + height, left : left + width]


def to_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """Make a picture a square: on white where it is transparent, resized to cover it, cut around the centre.

    Args:
        image: of any mode and size.
        resolution: the square's sides in pixels.

    Returns:
        Pixels in [-1, 1], (1, 3, `resolution`, `resolution`), float32.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = VaeImageProcessor(do_resize=False, do_convert_rgb=True).preprocess(image)
    return fit_image(pixels, resolution, resolution)


def pixels_to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Turn pixels into the pictures that diffusers makes of them, rounded to bytes where they are.

    A GPU rounds faster than the host, and copies bytes faster than floats.

    Args:
        pixels: in [0, 1], (images, 3, height, width).

    Returns:
        The pictures.
    """
    rounded = (pixels.float() * 255).round_().to(torch.uint8)
    return [Image.fromarray(array) for array in rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
