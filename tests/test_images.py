import io
import math

import numpy as np
import pytest
import torch
from diffusers import SanaSprintImg2ImgPipeline, SCMScheduler
from PIL import Image, ImageOps
from tiny import generate, tiny_tbcm_pipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.images import fit_image, load_image, to_pixels, to_rgb


HALF_PI = math.pi / 2
PROMPTS = ["a red fox", "the long and winding road to the northern harbour"]


def picture(height: int = 64, width: int = 64, seed: int = 0) -> Image.Image:
    """Colours that change slowly, so that resizing keeps them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def shared_pipeline():
    return tiny_tbcm_pipeline()


@pytest.fixture
def pipeline(shared_pipeline):
    pipeline = SanaTBCMPipeline(**{**shared_pipeline.components, "scheduler": TBCMScheduler()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# pixels


def test_every_kind_of_image_is_the_same_pixels():
    image = picture(24, 40)
    array = np.asarray(image, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    pixels = load_image(image, 24, 40, multiple=8)
    assert pixels.shape == (1, 3, 24, 40)
    torch.testing.assert_close(pixels[0], 2 * tensor - 1)
    for other in (array, tensor, [image], [array], [tensor], array[None], tensor[None], (image,), array.astype(float)):
        assert torch.equal(load_image(other, 24, 40, multiple=8), pixels)
    assert load_image([image, image], 24, 40, multiple=8).shape == (2, 3, 24, 40)
    assert load_image(image.convert("L"), 24, 40, multiple=8).shape == (1, 3, 24, 40)


def test_an_image_is_resized_and_never_distorted():
    pixels = load_image(picture(128, 256), 32, 64, multiple=8)
    small = load_image(picture(32, 64), 32, 64, multiple=8)
    assert (fit_image(pixels, 32, 64) - small).abs().mean() < 0.02
    assert torch.equal(fit_image(small, 32, 64), small)
    middle = torch.arange(8.0).expand(1, 3, 4, 8)
    assert torch.equal(fit_image(middle, 4, 4), middle[..., 2:6])  # nothing to resize, the sides cut off
    for height, width in [(49, 49), (49, 64), (101, 53)]:  # scales that floats do not hold exactly
        assert fit_image(torch.ones(1, 3, height, width), 64, 64).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64, 3), dtype=np.uint8), r"`image` holds uint8, but has to hold floats in \[0, 1\]"),
        ([torch.zeros(3, 64, 64, dtype=torch.uint8)], r"`image` holds torch\.uint8"),
        (torch.zeros(3, 64, 64, dtype=torch.bool), r"`image` holds torch\.bool"),
        (np.zeros((64, 64, 3), dtype=object), "`image` holds object"),
        (torch.zeros(1, 4, 64, 64), r"`image` has the shape \(1, 4, 64, 64\)"),
        (np.zeros((64, 64), dtype=np.float32), r"`image` has the shape \(64, 64\)"),
        (np.zeros((64, 0, 3), dtype=np.float32), r"`image` has the shape \(64, 0, 3\)"),
        (np.float32(0.5), "`image` holds a float32, which is no image"),
        (np.full((64, 64, 3), 200.0), r"`image` holds floats from 200 to 200, .* in \[0, 1\]: divide those up to 255"),
        (torch.full((1, 3, 64, 64), -1.0), "`image` holds floats from -1 to -1"),
        ([torch.full((3, 64, 64), math.nan)], "`image` holds floats from nan to nan"),
        (Image.new("F", (64, 64), 200), "`image` holds floats from 200 to 200"),
        (Image.new("F", (64, 64), math.nan), "`image` holds floats from nan to nan"),
        (Image.new("I", (64, 64), 200), "`image` has mode 'I', integers of which none is white"),
        (Image.new("RGB", (0, 64)), "`image` has no pixels: it is 0 x 64"),
        ([], "`image` is an empty list"),
        ([None], "`image` holds a NoneType, which is no image"),
        ([picture(64, 64), picture(32, 32)], "`image` holds images of several sizes: 64 x 64, 32 x 32"),
        (picture(64, 96), "`image` is 96 x 64 pixels .* 64 x 64 of the picture to make: crop it, or pass"),
        (picture(640, 722), "`image` is 722 x 640 pixels"),
        ("fox.png", "`image` holds a str, which is no image"),
    ],
)
def test_images_that_cannot_be_used_are_named(pipeline, image, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, image=image)


# image-to-image


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_full_strength_is_text_to_image(pipeline, steps):
    expected = generate(pipeline, num_inference_steps=steps)
    assert torch.equal(generate(pipeline, num_inference_steps=steps, image=picture(), strength=1.0), expected)


@pytest.mark.parametrize(("steps", "stock_steps", "strength"), [(1, 2, 0.5), (2, 4, 0.5), (1, 4, 0.25), (3, 4, 0.75)])
def test_images_are_those_of_the_stock_image_to_image_pipeline(pipeline, steps, stock_steps, strength):
    # which takes a share of even steps, where ours takes all of them from the same angle
    stock = SanaSprintImg2ImgPipeline(**{**pipeline.components, "scheduler": SCMScheduler()})
    stock.set_progress_bar_config(disable=True)
    time = {"num_inference_steps": stock_steps, "max_timesteps": HALF_PI, "intermediate_timesteps": None}
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    image = picture()
    expected = generate(stock, image=image, strength=strength, **time, **size)
    ours = generate(pipeline, image=image, strength=strength, num_inference_steps=steps, max_timesteps=HALF_PI)
    assert pipeline.num_timesteps == steps
    # the angles are rounded otherwise in the last bit
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_strength_multiplies_the_schedule(pipeline):
    generate(pipeline, image=picture(), strength=0.6)
    torch.testing.assert_close(pipeline.scheduler.timesteps, torch.tensor([0.6 * HALF_PI, 0.6, 0.0]))
    generate(pipeline, image=picture(), strength=0.5, timesteps=[1.2, 0.8, 0.0])
    torch.testing.assert_close(pipeline.scheduler.timesteps, torch.tensor([0.6, 0.4, 0.0]))


def test_the_less_strength_the_more_of_the_image_is_left(pipeline):
    image = picture()
    with torch.no_grad():
        latent = pipeline.vae.encode(load_image(image, 64, 64, multiple=8)).latent
        reconstruction = (pipeline.vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)
    distances = [
        (generate(pipeline, image=image, strength=strength, num_inference_steps=1) - reconstruction).abs().mean()
        for strength in (1e-4, 0.2, 0.5, 1.0)
    ]
    assert distances[0] < 1e-3  # at no strength, what the autoencoder makes of the image
    assert distances == sorted(distances)


def test_each_prompt_has_its_image(pipeline):
    images = [picture(seed=1), picture(seed=2)]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)]
    together = generate(pipeline, PROMPTS, image=images, strength=0.4, num_images_per_prompt=2, generator=generators)
    for index, owner in enumerate([0, 0, 1, 1]):
        alone = generate(pipeline, PROMPTS[owner], image=images[owner], strength=0.4, seed=3 + index)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0)  # batched matmuls differ
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    one_image = generate(pipeline, PROMPTS, image=images[0], strength=0.4, generator=generators)
    torch.testing.assert_close(one_image[:1], together[:1], atol=1e-5, rtol=0)


def test_an_image_is_binned_as_the_picture_is(pipeline):
    image = picture(50, 101)
    arguments = {"image": image, "height": 50, "width": 101, "use_resolution_binning": True, "strength": 1e-4}
    drawn = generate(pipeline, num_inference_steps=1, **arguments)
    assert drawn.shape == (1, 3, 50, 101)
    assert generate(pipeline, output_type="latent", **arguments).shape == (1, 4, 6, 11)  # the bin of 48 x 88


def test_an_image_is_forgotten_after_its_call(pipeline):
    expected = generate(pipeline)
    generate(pipeline, image=picture(), strength=0.3)
    assert torch.equal(generate(pipeline), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.0}, "`strength` is 0.0, but has to lie in"),
        ({"strength": 1.1}, "`strength` is 1.1"),
        ({"strength": float("nan")}, "`strength` is nan"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "`latents` and `image` are both given"),
        ({"image": [picture(), picture()]}, "`image` holds 2 images, but 1 are to be made"),
        ({"height": 60, "width": 60}, "`height` is 60, but has to be a positive multiple of 8"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ],
)
def test_bad_calls_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, **{"image": picture(), **arguments})


# one reader


RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # white is to the right
AS_16_BITS = RAMP.astype(np.uint16) * 257


def in_file(image: Image.Image, kind: str, **options) -> Image.Image:
    """A picture as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


def assert_read_alike(image: Image.Image, expected: np.ndarray) -> None:
    """Every reader gives these colours, (height, width, 3), to a unit in 8 bits."""
    size = expected.shape[0]
    read = to_rgb(image)
    assert read.mode == "RGB" and np.abs(np.asarray(read).astype(int) - expected).max() <= 1
    assert np.array_equal(to_rgb(read), read)
    wanted = torch.from_numpy(np.array(read, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(load_image(image, *read.size[::-1], multiple=8), wanted)
    if read.size == (size, size):
        torch.testing.assert_close(to_pixels(image, size), wanted)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_8_bits_is_scaled_by_it(mode):
    steps = {"La": "LA", "PA": "LA", "RGBa": "RGBA", "RGBX": "RGB", "HSV": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}
    image = Image.fromarray(RAMP)
    image = image.convert(steps[mode]) if mode in steps else image
    assert_read_alike(image.convert(mode), np.stack([RAMP] * 3, axis=-1))


def test_deep_and_shallow_pictures_are_scaled_by_their_mode():
    expected = np.stack([RAMP] * 3, axis=-1)
    deep = Image.fromarray(AS_16_BITS)
    for image in (
        deep,
        in_file(deep, "PNG"),
        in_file(deep, "TIFF"),
        Image.fromarray(AS_16_BITS.astype(">u2")),
    ):
        assert_read_alike(image, expected)
    older = Image.fromarray(AS_16_BITS.astype(np.int32))  # as Pillow 10 opens such a PNG file
    older.format = "PNG"
    assert_read_alike(older, expected)
    floats = Image.fromarray(RAMP.astype(np.float32) / 255)
    for image in (floats, in_file(floats, "TIFF")):
        assert_read_alike(image, expected)
    bits = Image.fromarray(RAMP >= 128)
    assert bits.mode == "1"
    assert_read_alike(bits, np.where(expected >= 128, 255, 0))


def test_transparent_pictures_are_on_white_whatever_their_mode():
    hidden = Image.new("RGBA", (64, 64), (0, 255, 0, 0))  # green that no viewer shows
    hidden.paste((255, 0, 0, 255), (0, 0, 64, 32))
    expected = np.array(Image.new("RGB", (64, 64), "white"))
    expected[:32] = (255, 0, 0)
    for image in (hidden, in_file(hidden, "PNG"), in_file(hidden, "WEBP", lossless=True), hidden.convert("RGBa")):
        assert_read_alike(image, expected)
    palette = in_file(hidden.convert("RGB").quantize(2), "PNG", transparency=0)  # the first colour of the palette
    rgb = palette.convert("RGB")
    first = tuple(palette.getpalette()[:3])
    assert_read_alike(palette, np.where((np.asarray(rgb) == first).all(-1, keepdims=True), 255, np.asarray(rgb)))
    keyed = in_file(hidden.convert("RGB"), "PNG", transparency=(0, 255, 0))
    assert_read_alike(keyed, expected)
    grey = np.where(RAMP == 40, 255, RAMP)
    for image in (Image.fromarray(RAMP), Image.fromarray(AS_16_BITS)):
        key = 40 if image.mode == "L" else 40 * 257
        try:
            saved = in_file(image, "PNG", transparency=key)
        except OSError:  # older Pillows write no 16 bits with transparency
            continue
        assert_read_alike(saved, np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_as_their_exif_says(kind):
    photo = Image.new("RGB", (64, 32), "blue")
    photo.paste("yellow", (0, 0, 64, 16))  # yellow above blue, as the camera saved it
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = in_file(photo, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        shown = ImageOps.exif_transpose(stored)
        assert shown.size == ((64, 32) if orientation < 5 else (32, 64))
        assert_read_alike(stored, np.asarray(shown.convert("RGB")))
    assert to_rgb(in_file(photo, "JPEG", exif=b"Exif\0\0no such thing")).size == photo.size


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pictures_are_covered_cropped_and_put_on_white(mode):
    # A wide picture with a black middle third, transparent outside where it can be.
    image = Image.new("RGBA", (96, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (32, 0, 64, 32))
    if mode in ("RGB", "L"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = to_pixels(image.convert(mode) if mode != "P" else image.quantize(8), 32)
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32
    assert (pixels == -1).all()  # the middle
    halved = to_pixels(image.crop((16, 0, 80, 64)).resize((64, 64)), 32)
    assert halved.shape == (1, 3, 32, 32)


def test_transparency_is_white():
    image = Image.new("RGBA", (32, 32), (0, 255, 0, 0))
    assert (to_pixels(image, 32) == 1).all()
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    torch.testing.assert_close(to_pixels(half, 32), torch.full((1, 3, 32, 32), 1 - 2 * 128 / 255))
