"""Pictures in pixels: the sizes that Sana was trained at, and the one way in which any picture is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from PIL import Image, ImageOps


WHITE_OF_16_BITS = 65535


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Read a picture as a viewer shows it: turned as its EXIF says, on white where it is transparent, 8 bits a colour.

    Args:
        image: of any mode whose white is known: floats in [0, 1], 16-bit grey, or any kind of 8 bits.

    Returns:
        The picture, of mode RGB; one that has been read already stays as it is.

    Raises:
        ValueError: for a picture without pixels, and for a mode or values that have no white.
    """
    if 0 in image.size:
        raise ValueError(f"`image` has no pixels: it is {image.width} x {image.height}.")
    # Pillow opens 16-bit grey PPM files, and its older versions PNG files, as 32-bit integers
    is_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = _turned(image)
    if is_16_bits:
        values = np.asarray(image).astype(np.float32)
        key = image.info.get("transparency")  # the grey that stands for nothing
        image = _grey(np.where(values == key, 1, values / WHITE_OF_16_BITS))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # nor where one is not a number
            raise ValueError(
                f"`image` holds floats from {values.min():g} to {values.max():g}, but they have to lie in [0, 1]."
            )
        image = _grey(values)
    elif image.mode == "I":
        raise ValueError("`image` has mode 'I', integers of which none is white: make it one of 8 or 16 bits.")
    try:
        if image.has_transparency_data or image.mode == "P":
            image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"`image` has mode {image.mode!r}, which is not red, green and blue: {error}.") from error


def load_image(image: PipelineImageInput, height: int, width: int, multiple: int) -> torch.Tensor:
    """Turn what diffusers takes for an image, or several, into a tensor that can become the wanted size.

    Args:
        image: PIL images, arrays (height, width, 3) or tensors (3, height, width) of floats in [0, 1]; one, a batch or
            a list.
        height: of the picture to make, in pixels.
        width: of the picture to make, in pixels.
        multiple: of pixels that sizes are rounded to: up to so many may be cut off.

    Returns:
        Pixels in [-1, 1], (images, 3, image height, image width), at the size that they came in, float32.

    Raises:
        ValueError: for what is no image, for other numbers than floats in [0, 1], for other channels than red, green
            and blue, for images of several sizes, and for one that would be distorted or cropped.
    """
    parts = [_to_unit_range(part) for part in (image if isinstance(image, list | tuple) else [image])]
    if not parts:
        raise ValueError("`image` is an empty list: give one image, or one for each prompt.")
    sizes = list(dict.fromkeys(f"{part.shape[3]} x {part.shape[2]}" for part in parts))
    if len(sizes) > 1:
        raise ValueError(f"`image` holds images of several sizes: {', '.join(sizes)}. Give them one size.")
    pixels = 2 * torch.cat(parts) - 1
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
    """Make a picture a square: read by `to_rgb`, resized to cover it, cut around the centre.

    Args:
        image: of any size.
        resolution: the square's sides in pixels.

    Returns:
        Pixels in [-1, 1], (1, 3, `resolution`, `resolution`), float32.

    Raises:
        ValueError: as `to_rgb`.
    """
    return fit_image(2 * _to_unit_range(image) - 1, resolution, resolution)


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


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError):  # EXIF that cannot be read turns nothing, as in a viewer
        return image


def _grey(values: np.ndarray) -> Image.Image:
    """A picture of values in [0, 1]."""
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _to_unit_range(image: Any) -> torch.Tensor:
    """One image of any kind, or a batch of arrays or tensors, as (images, 3, height, width) in [0, 1], float32."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(to_rgb(image), dtype=np.float32)[None] / 255).permute(0, 3, 1, 2)
    if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
        pixels = torch.from_numpy(image.astype(np.float32))
        pixels = pixels.movedim(-1, -3) if pixels.ndim in (3, 4) else pixels
    elif isinstance(image, torch.Tensor) and image.is_floating_point():
        pixels = image.float()
    elif isinstance(image, np.ndarray | torch.Tensor):
        raise ValueError(f"`image` holds {image.dtype}, but has to hold floats in [0, 1] or be a PIL image.")
    else:
        raise ValueError(
            f"`image` holds a {type(image).__name__}, which is no image: give PIL images, arrays (height, width, 3) or"
            " tensors (3, height, width)."
        )
    pixels = pixels.unsqueeze(0) if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"`image` has the shape {tuple(image.shape)}, but has to be an array (height, width, 3) or a tensor (3,"
            " height, width), its channels red, green and blue, or a batch of those."
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # nor where one is not a number
        raise ValueError(
            f"`image` holds floats from {low:g} to {high:g}, but they have to lie in [0, 1]: divide those up to 255 by"
            " 255, halve those from -1 and add 0.5."
        )
    return pixels
