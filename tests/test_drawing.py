"""The one way to draw pictures: of prompts or their embeddings, in batches, each from a generator of its own."""

from itertools import islice

import numpy as np
import pytest
import torch
from tiny import tiny_sana_pipeline, tiny_tbcm_pipeline

from diffusers_tbcm.draws import draw_generator
from diffusers_tbcm.evaluation.drawing import draw, draw_pictures, load_pipeline, numbered_generators
from diffusers_tbcm.text import Text


PROMPTS = ["a dog", "a violin", "three little birds"]
READING = {"complex_human_instruction": None, "max_sequence_length": 16}
SEED = 3


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


def called(pipeline, places, **arguments):
    """The pipeline's own call for the prompts of some places."""
    generators = [draw_generator(place, SEED) for place in places]
    return pixels(pipeline(num_inference_steps=2, generator=generators, **arguments).images)


def test_pictures_are_those_of_the_pipelines_call_bit_for_bit(pipeline):
    found = pixels(draw_pictures(pipeline, PROMPTS, numbered_generators(SEED), num_inference_steps=2, **READING))
    assert np.array_equal(found, called(pipeline, range(3), prompt=PROMPTS, **READING))
    assert len(np.unique(found.reshape(3, -1), axis=0)) == 3


def test_a_batch_is_a_call_and_its_generators_go_on_where_the_last_ended(pipeline):
    drawn = draw_pictures(pipeline, PROMPTS, numbered_generators(SEED), num_inference_steps=2, batch_size=2, **READING)
    batches = [called(pipeline, places, prompt=[PROMPTS[i] for i in places], **READING) for places in ([0, 1], [2])]
    assert np.array_equal(pixels(drawn), np.concatenate(batches))


def test_a_batch_is_drawn_when_its_first_picture_is_asked_for(pipeline, monkeypatch):
    calls = []
    call = type(pipeline).__call__
    monkeypatch.setattr(type(pipeline), "__call__", lambda self, **kw: calls.append(kw["prompt"]) or call(self, **kw))
    drawn = draw_pictures(pipeline, PROMPTS, numbered_generators(0), num_inference_steps=1, batch_size=2, **READING)
    assert calls == []
    assert len(list(islice(drawn, 2))) == 2 and calls == [PROMPTS[:2]]
    assert len(list(drawn)) == 1 and calls == [PROMPTS[:2], PROMPTS[2:]]
    assert list(draw_pictures(pipeline, [], [], num_inference_steps=1)) == [] and len(calls) == 2


@pytest.mark.parametrize("batch_size", [None, 2])
def test_embeddings_are_drawn_as_their_prompts_are(pipeline, batch_size):
    embeds, mask, *_ = pipeline.encode_prompt(PROMPTS, **READING)
    text = Text(embeds, mask)
    options = {"num_inference_steps": 2, "batch_size": batch_size}
    from_text = pixels(draw_pictures(pipeline, text, numbered_generators(SEED), **options))
    from_prompts = pixels(draw_pictures(pipeline, PROMPTS, numbered_generators(SEED), **options, **READING))
    assert np.abs(from_text.astype(int) - from_prompts).max() <= 1  # embedded together or in batches: rounding


def test_a_teachers_pipeline_draws_too():
    teacher = tiny_sana_pipeline()
    teacher.set_progress_bar_config(disable=True)
    options = {**READING, "height": 64, "width": 64, "use_resolution_binning": False, "guidance_scale": 3.0}
    found = pixels(draw_pictures(teacher, PROMPTS, numbered_generators(SEED), num_inference_steps=2, **options))
    assert np.array_equal(found, called(teacher, range(3), prompt=PROMPTS, **options))


def test_generators_are_numbered_by_place():
    for place, generator in enumerate(islice(numbered_generators(SEED), 3)):
        assert torch.equal(torch.randn(4, generator=generator), torch.randn(4, generator=draw_generator(place, SEED)))


def test_drawings_come_by_prompt_then_steps_then_seed_each_as_if_alone(pipeline):
    drawings = list(draw(pipeline, PROMPTS[:2], steps=[1, 2], seeds=[0, 5], **READING))
    keys = [(drawing.prompt, drawing.num_inference_steps, drawing.seed) for drawing in drawings]
    assert keys == [(prompt, steps, seed) for prompt in PROMPTS[:2] for steps in (1, 2) for seed in (0, 5)]
    for drawing in drawings:
        generator = torch.Generator().manual_seed(drawing.seed)
        alone = pipeline(
            drawing.prompt, num_inference_steps=drawing.num_inference_steps, generator=generator, **READING
        )
        assert np.array_equal(drawing.image, alone.images[0]) and drawing.seconds > 0


def test_a_half_precision_variant_is_loaded_where_it_is_asked_for(tmp_path):
    half = tiny_tbcm_pipeline().to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant="bf16", max_shard_size="5KB")
    loaded = load_pipeline(tmp_path, variant="bf16", device="cpu")
    for name in ("transformer", "text_encoder", "vae"):
        for found, weight in zip(getattr(loaded, name).parameters(), getattr(half, name).parameters(), strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, weight.float())
    with pytest.raises((OSError, ValueError), match=r"no file named|model files|variant"):
        load_pipeline(tmp_path, device="cpu")
