"""Black is not a picture: what is not a number is warned of by the pipeline, and an error where pictures are kept."""

import warnings

import numpy as np
import pytest
import torch
from tiny import generate, tiny_sana_pipeline, tiny_tbcm_pipeline

from diffusers_tbcm.evaluation.drawing import draw, draw_pictures, numbered_generators
from diffusers_tbcm.finite import FiniteImageProcessor, NotFiniteWarning, is_finite


READING = {"complex_human_instruction": None, "max_sequence_length": 16}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def spoil(pipeline, part, value=float("nan")):
    weights = {
        "transformer": lambda: pipeline.transformer.proj_out.bias,
        "vae": lambda: pipeline.vae.decoder.conv_out.bias,
        "text_encoder": lambda: pipeline.text_encoder.norm.weight,
    }
    with torch.no_grad():
        weights[part]()[0] = value
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_nan_is_warned_of_whatever_becomes_of_it(part, output_type):
    pipeline = spoil(tiny_tbcm_pipeline(), part)
    with pytest.warns(NotFiniteWarning, match="NaN or infinity, which shows as black"):
        generate(pipeline, output_type=output_type)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("output_type", OUTPUT_TYPES[:3])
@pytest.mark.parametrize("binned", [False, True])
def test_what_overflows_in_the_autoencoder_is_warned_of(value, output_type, binned):
    pipeline = spoil(tiny_tbcm_pipeline(), "vae", value)
    with pytest.warns(NotFiniteWarning):
        generate(pipeline, output_type=output_type, use_resolution_binning=binned)
    with pytest.warns(NotFiniteWarning):
        pipeline.decode_latents(torch.zeros(1, 4, 8, 8), output_type)


def test_half_precision_that_overflows_is_warned_of():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(torch.float16)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.mul_(6e4)
        pipeline.vae.decoder.conv_out.bias.fill_(6e4)
    with pytest.warns(NotFiniteWarning):
        generate(pipeline)


def test_what_a_callback_spoils_is_warned_of():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    spoilt = {"latents": torch.full((1, 4, 8, 8), float("nan"))}
    with pytest.warns(NotFiniteWarning):
        generate(pipeline, callback_on_step_end=lambda *_: dict(spoilt))


def test_a_picture_is_not_warned_of():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for output_type in OUTPUT_TYPES:
            generate(pipeline, output_type=output_type)


@pytest.mark.filterwarnings("ignore::diffusers_tbcm.finite.NotFiniteWarning")
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_drawing_for_keeps_fails_and_names_the_prompt(part):
    pipeline = spoil(tiny_tbcm_pipeline(), part, float("inf"))
    with pytest.raises(ValueError, match="The picture of 'a dog' at 1 step is not finite"):
        next(draw(pipeline, ["a dog"], steps=[1], seeds=[0], **READING))
    teacher = spoil(tiny_sana_pipeline(), "transformer")
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    drawn = draw_pictures(teacher, ["an owl"], numbered_generators(0), num_inference_steps=2, **size, **READING)
    with pytest.raises(ValueError, match="The picture of 'an owl' at 2 steps is not finite"):
        next(drawn)


@pytest.mark.filterwarnings("ignore::diffusers_tbcm.finite.NotFiniteWarning")
def test_pictures_before_the_one_that_is_none_are_given():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def spoil_second(pipe, step, timestep, tensors):
        tensors["latents"][1] = float("nan")
        return tensors

    drawn = draw_pictures(
        pipeline,
        ["a dog", "an owl"],
        numbered_generators(0),
        num_inference_steps=2,
        callback_on_step_end=spoil_second,
        **READING,
    )
    assert np.asarray(next(drawn)).std() > 0
    with pytest.raises(ValueError, match="The picture of 'an owl' at 2 steps is not finite"):
        next(drawn)


def test_the_image_processor_is_diffusers_own_for_numbers():
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, stock = FiniteImageProcessor(vae_scale_factor=8), tiny_sana_pipeline().image_processor
    assert torch.equal(ours.postprocess(pixels, "pt"), stock.postprocess(pixels, "pt"))
    assert np.array_equal(ours.postprocess(pixels, "np"), stock.postprocess(pixels, "np"))
    assert is_finite(pixels) and is_finite(pixels.numpy())
    pixels[0, 0, 0, 0] = float("inf")
    assert not is_finite(pixels) and not is_finite(ours.postprocess(pixels, "np"))
