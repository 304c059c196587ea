from collections import Counter

import pytest
import torch
from numbered_rows import PLACES, assert_rows_belong_together, recording

from diffusers_tbcm.training.replay import ReplayBuffer


def test_a_buffer_of_one_recording_gives_it_back_in_order():
    buffer = ReplayBuffer(1)
    for first in (0, 7):
        buffer.add(recording(first, 2))
    rows = buffer.sample(2 * PLACES, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.timesteps, recording(7, 2).rows().timesteps)


def test_samples_are_uniform_different_rows_of_the_latest_recordings():
    buffer = ReplayBuffer(3)
    for first, prompts in ((0, 2), (2, 2), (4, 0), (5, 3)):
        buffer.add(recording(first, prompts, length=2 + first))
    assert len(buffer) == 5 * PLACES  # the first gave way
    generator, counts, draws = torch.Generator().manual_seed(0), Counter(), 3000
    for _ in range(draws):
        rows = buffer.sample(5, generator)
        assert len(set(rows.timesteps.tolist())) == 5
        counts.update(round(t, 1) for t in rows.timesteps.tolist())
    assert_rows_belong_together(rows)
    expected = {round(prompt + place / 10, 1) for prompt in (2, 3, 5, 6, 7) for place in range(PLACES)}
    assert counts.keys() == expected
    # each count is binomial with p = 1/3: five standard deviations
    assert all(abs(count - draws / 3) < 5 * (draws * 2 / 9) ** 0.5 for count in counts.values())
    assert len(buffer.sample(100, generator)) == 5 * PLACES


def test_prompts_of_unequal_length_are_padded_with_masked_tokens_and_only_as_far_as_needed():
    buffer = ReplayBuffer(2)
    buffer.add(recording(0, 1, length=2))
    buffer.add(recording(1, 1, length=6))
    rows = buffer.sample(100, torch.Generator())
    assert rows.text.embeds.shape == (2 * PLACES, 6, 4)
    assert rows.text.mask.sum(1).tolist() == [2] * PLACES + [6] * PLACES
    assert_rows_belong_together(rows)
    lengths = {tuple(buffer.sample(1, torch.Generator().manual_seed(seed)).text.embeds.shape) for seed in range(20)}
    assert lengths == {(1, 2, 4), (1, 6, 4)}


def test_a_buffer_whose_prompts_were_all_dropped_gives_no_rows():
    buffer = ReplayBuffer(2)
    buffer.add(recording(0, 2).select(torch.zeros(2, dtype=torch.bool)))
    assert len(buffer.sample(4, torch.Generator())) == 0
    with pytest.raises(ValueError, match="`capacity` is 0"):
        ReplayBuffer(0)
