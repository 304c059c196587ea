"""The order and randomness that prompts are drawn with."""

import pytest
import torch
from toy_networks import generators

from diffusers_tbcm.draws import (
    draw_generator,
    draw_guidance_scale,
    draw_noise,
    per_prompt_generators,
    prompt_at,
)


SCALES = [4.0, 4.5, 5.0, 5.5]


def test_every_epoch_sees_every_prompt_once_in_an_order_of_its_own():
    epochs = [[prompt_at(epoch * 50 + i, 50, seed=3) for i in range(50)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != [prompt_at(i, 50, seed=4) for i in range(50)]


def test_draws_have_generators_of_their_own():
    keys = [(draw, seed, stream) for draw in (0, 1) for seed in (0, 1) for stream in (0, 1)]
    values = {key: torch.randn(4, generator=draw_generator(*key)) for key in keys}
    assert torch.equal(values[1, 0, 0], torch.randn(4, generator=draw_generator(1, 0)))
    assert len({tuple(value.tolist()) for value in values.values()}) == len(keys)


def draw_both(own):
    """What a draw takes from its generator: first the guidance scale, then the noise."""
    return draw_guidance_scale(SCALES, own), draw_noise((2, 3), own)


def test_a_draw_takes_its_random_numbers_in_the_order_of_the_calls():
    scale, noise = draw_both(generators(3, 4))
    for index, generator in enumerate(generators(3, 4)):
        assert scale[index] == SCALES[int(torch.randint(len(SCALES), (), generator=generator))]
        assert torch.equal(noise[index], torch.randn((2, 3), generator=generator))
    assert not torch.equal(draw_noise((2, 3), generators(3, 4)), noise)  # without the scale before it


def test_a_draw_does_not_depend_on_the_draws_beside_it():
    scale, noise = draw_both([draw_generator(draw, seed=1) for draw in range(8)])
    for draw in range(8):
        alone = draw_both([draw_generator(draw, seed=1)])
        assert torch.equal(scale[draw : draw + 1], alone[0]) and torch.equal(noise[draw : draw + 1], alone[1])
    backwards = draw_both([draw_generator(draw, seed=1) for draw in reversed(range(8))])
    assert torch.equal(scale, backwards[0].flip(0)) and torch.equal(noise, backwards[1].flip(0))
    assert len({tuple(one.flatten().tolist()) for one in noise}) == 8 and len(scale.unique()) > 1


def test_every_scale_has_the_same_chance_and_noise_is_standard_normal():
    count = 4000
    scale, noise = draw_both([draw_generator(draw, seed=0) for draw in range(count)])
    assert scale.shape == (count,) and noise.shape == (count, 2, 3)
    assert scale.dtype == noise.dtype == torch.float32
    assert sorted(scale.unique().tolist()) == SCALES
    for value in SCALES:  # four standard errors
        assert (scale == value).double().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / count) ** 0.5)
    numbers = noise.numel()
    assert noise.mean().item() == pytest.approx(0, abs=4 / numbers**0.5)
    assert noise.std().item() == pytest.approx(1, abs=4 / (2 * numbers) ** 0.5)
    assert abs(torch.corrcoef(torch.stack([scale, noise[:, 0, 0]]))[0, 1]) < 4 / count**0.5


def test_what_is_drawn_lies_where_it_is_asked_for():
    own = generators(0)
    assert draw_guidance_scale(SCALES, own).device == draw_noise((2,), own).device == torch.device("cpu")
    meta = torch.device("meta")
    assert draw_guidance_scale(SCALES, own, device=meta).device == draw_noise((2,), own, device="meta").device == meta


def test_a_generator_for_all_is_every_prompts_and_a_list_has_one_for_each():
    generator, *own = generators(0, 1, 2)
    assert list(per_prompt_generators(generator, 3)) == [generator] * 3
    assert list(per_prompt_generators(None, 2)) == [None] * 2
    assert per_prompt_generators(own, 2) is own
    with pytest.raises(ValueError, match="`generator` is a list of 2 generators for a batch of 3 prompts"):
        per_prompt_generators(own, 3)
