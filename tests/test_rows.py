import torch
from numbered_rows import PLACES, assert_rows_belong_together, recording

from diffusers_tbcm.rows import TrainingRows


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


def test_all_rows_share_their_prompts_and_chosen_ones_have_a_prompt_each():
    shared, chosen = recording(5, 2).rows(), recording(5, 2).rows(torch.arange(2 * PLACES))
    assert len(shared.text) == 2 and len(chosen.text) == 2 * PLACES
    assert_rows_belong_together(chosen)
    torch.testing.assert_close(chosen.timesteps, shared.timesteps)


def test_rows_are_put_together_in_order_padded_to_the_longest_prompt():
    parts = [recording(first, 2, length).rows(torch.arange(2 * PLACES)) for first, length in ((0, 2), (2, 5))]
    rows = TrainingRows.cat(parts)
    torch.testing.assert_close(rows.timesteps, torch.cat([part.timesteps for part in parts]))
    assert rows.text.embeds.shape == (4 * PLACES, 5, 4)
    assert rows.text.mask.sum(1).tolist() == [2] * 2 * PLACES + [5] * 2 * PLACES
    assert_rows_belong_together(rows)
