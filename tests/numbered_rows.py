"""Recordings whose every number says where it belongs."""

import torch

from diffusers_tbcm.rows import Recording, TrainingRows
from diffusers_tbcm.text import Text


PLACES = 3


def recording(first: int, prompts: int, length: int = 2) -> Recording:
    """Every tensor says which prompt it is of, and the timesteps which place: prompt + place / 10."""
    prompt = torch.arange(first, first + prompts, dtype=torch.float32)
    place = torch.arange(PLACES) / 10
    by_row = (prompt[:, None] + place)[..., None, None, None].expand(-1, -1, 1, 2, 2)
    embeds = prompt[:, None, None].expand(-1, length, 4)
    return Recording(
        latents=by_row,
        velocity=-by_row,
        timesteps=prompt[:, None] + place,
        pred_original_sample=prompt[:, None, None, None].expand(-1, 1, 2, 2),
        text=Text.unmasked(embeds),
        guidance_scale=10 * prompt,
    )


def assert_rows_belong_together(rows: TrainingRows) -> None:
    prompt = rows.timesteps.floor()
    torch.testing.assert_close(rows.latents[:, 0, 0, 0], rows.timesteps)
    torch.testing.assert_close(rows.velocity[:, 0, 0, 0], -rows.timesteps)
    torch.testing.assert_close(rows.pred_original_sample[:, 0, 0, 0], prompt)
    torch.testing.assert_close(rows.guidance_scale, 10 * prompt)
    mask = rows.text.mask
    of_prompts = prompt.view(len(mask), -1)[:, :1] if len(mask) else prompt[:0, None]
    torch.testing.assert_close(rows.text.embeds[..., 0], of_prompts * mask)
