from collections import Counter

import pytest
import torch

from diffusers_tbcm.training.replay import Recording, ReplayBuffer, TrainingRows
from diffusers_tbcm.trajectory import TrajectoryOutput


PLACES = 3


def recording(first: int, prompts: int, length: int = 2) -> Recording:
    """Every tensor says which prompt it is of, and the timesteps which place: prompt + place / 10."""
    prompt = torch.arange(first, first + prompts, dtype=torch.float32)
    place = torch.arange(PLACES) / 10
    by_row = (prompt[:, None] + place)[..., None, None, None].expand(-1, -1, 1, 2, 2)
    trajectory = TrajectoryOutput(
        latents=by_row,
        velocity=-by_row,
        timesteps=prompt[:, None] + place,
        pred_original_sample=prompt[:, None, None, None].expand(-1, 1, 2, 2),
    )
    embeds = prompt[:, None, None].expand(-1, length, 4)
    return Recording(trajectory, embeds, torch.ones(prompts, length, dtype=torch.long), 10 * prompt)


def assert_rows_belong_together(rows: TrainingRows) -> None:
    prompt = rows.timesteps.floor()
    torch.testing.assert_close(rows.latents[:, 0, 0, 0], rows.timesteps)
    torch.testing.assert_close(rows.velocity[:, 0, 0, 0], -rows.timesteps)
    torch.testing.assert_close(rows.pred_original_sample[:, 0, 0, 0], prompt)
    torch.testing.assert_close(rows.guidance_scale, 10 * prompt)
    mask = rows.prompt_attention_mask
    of_prompts = prompt.view(len(mask), -1)[:, :1] if len(mask) else prompt[:0, None]
    torch.testing.assert_close(rows.prompt_embeds[..., 0], of_prompts * mask)


def test_a_recordings_rows_are_its_trajectories_one_after_the_other():
    rows = recording(5, 2).rows()
    torch.testing.assert_close(rows.timesteps, torch.tensor([5.0, 5.1, 5.2, 6.0, 6.1, 6.2]))
    assert rows.latents.shape == (6, 1, 2, 2)
    assert_rows_belong_together(rows)
    torch.testing.assert_close(recording(5, 2).rows(torch.tensor([4, 0])).timesteps, torch.tensor([6.1, 5.0]))


def test_select_keeps_prompts_with_all_that_belongs_to_them():
    some = recording(0, 4).select(torch.tensor([1, 3]))
    assert len(some) == 2 * PLACES
    assert set(some.rows().timesteps.floor().tolist()) == {1.0, 3.0}
    assert_rows_belong_together(some.rows())
    none = recording(0, 4).select(torch.arange(0))
    assert len(none) == len(none.rows()) == 0


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
    assert rows.prompt_embeds.shape == (2 * PLACES, 6, 4)
    assert rows.prompt_attention_mask.sum(1).tolist() == [2] * PLACES + [6] * PLACES
    assert_rows_belong_together(rows)
    lengths = {tuple(buffer.sample(1, torch.Generator().manual_seed(seed)).prompt_embeds.shape) for seed in range(20)}
    assert lengths == {(1, 2, 4), (1, 6, 4)}


def test_a_buffer_whose_prompts_were_all_dropped_gives_no_rows():
    buffer = ReplayBuffer(2)
    buffer.add(recording(0, 2).select(torch.zeros(2, dtype=torch.bool)))
    assert len(buffer.sample(4, torch.Generator())) == 0
    with pytest.raises(ValueError, match="`capacity` is 0"):
        ReplayBuffer(0)
