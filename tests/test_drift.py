"""Brightness and saturation without decoding, and the alarm where a student leaves its teacher's."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from toy_networks import randn

from diffusers_tbcm.draws import draw_generator, draw_noise
from diffusers_tbcm.text import Text
from diffusers_tbcm.training import drift
from diffusers_tbcm.training.drift import DriftWatch, fit_colours, measure_tone


COLOURS = torch.tensor([[0.1, 0.02, -0.03], [-0.04, 0.05, 0.02]], dtype=torch.float64)
WORDS = "what the student draws has drifted"


def paint(latents):
    """Pictures whose colours are linear in the latents, 4 x 4 pixels a latent pixel, with texture in between."""
    colours = torch.einsum("bchw,cd->bdhw", latents.double(), COLOURS) + 0.4
    texture = torch.tensor([0.01, -0.01]).double().repeat(2 * latents.shape[-1])
    return colours.repeat_interleave(4, 2).repeat_interleave(4, 3) + texture


def test_the_fit_measures_what_the_pictures_are():
    fit = fit_colours(randn(2, 2, 3, 5), paint(randn(2, 2, 3, 5)))
    torch.testing.assert_close(fit, torch.cat([COLOURS, torch.full((1, 3), 0.4)]))
    other = randn(4, 2, 3, 5, seed=1)
    pictures, tone = paint(other), measure_tone(other.float(), fit)
    assert tone["brightness"] == pytest.approx(pictures.mean().item())
    assert tone["saturation"] == pytest.approx((pictures.amax(1) - pictures.amin(1)).mean().item())
    black, white = (torch.cat([torch.zeros(2, 3), torch.full((1, 3), value)]).double() for value in (0.0, 1.0))
    assert measure_tone(other, black) == {"brightness": 0, "saturation": 0}
    assert measure_tone(other, white) == {"brightness": 1, "saturation": 0}


class Network(torch.nn.Module):
    """v = e - x_0 of a picture that is the same everywhere: every rollout leads there."""

    guidance_embeds = False

    def __init__(self, conditional, unconditional):
        super().__init__()
        self.conditional, self.unconditional = conditional, unconditional

    def forward(self, sample, s, encoder_hidden_states, encoder_attention_mask):
        picture = torch.where(encoder_hidden_states[:, :1, :1, None] > 0, self.conditional, self.unconditional)
        return (sample - picture) / s.view(-1, 1, 1, 1)

    def rescale_guided(self, guided, conditional, sample, s):
        return guided


def text(value):
    return lambda prompts: Text.unmasked(torch.full((len(prompts), 1, 1), value))


@pytest.fixture
def watch():
    """A watch of a teacher whose pictures are 0.5: with guidance 3 of 0.4 and 0.35."""
    logged = []
    run = SimpleNamespace(
        settings=SimpleNamespace(seed=3, train_batch_size=3), device=torch.device("cpu"), step=0,
        accelerator=Accelerator(cpu=True), log=lambda **figures: logged.append(figures),
    )  # fmt: skip
    distillation = SimpleNamespace(
        teacher=Network(0.4, 0.35), latent_shape=(1, 4, 4), shift=3.0, encode=text(1.0), negative_text=text(0.0)([""]),
        decode=lambda latents: latents.expand(-1, 3, -1, -1),
    )  # fmt: skip

    def build(**changes):
        options = {"guidance_scale": 3.0, "every": 10, "tolerance": 0.02} | changes
        return run, logged, DriftWatch(run, distillation, ["a dog", "a cat"], **options)

    return build


def test_the_teacher_draws_with_guidance_and_the_untrained_student_without(watch):
    _, _, found = watch()
    assert found.teacher["brightness"] == pytest.approx(0.5) and found.teacher["saturation"] == pytest.approx(0)
    assert len(found._batches) == 3 and sum(len(noise) for noise, _ in found._batches) == 8
    expected = draw_noise((1, 4, 4), [draw_generator(draw, 3) for draw in range(8)])
    assert torch.equal(torch.cat([noise for noise, _ in found._batches]), expected)


def test_a_warning_comes_once_a_crossing(watch, caplog, monkeypatch):
    monkeypatch.setattr(drift, "fit_colours", lambda latents, pictures: torch.tensor([[1.0] * 3, [0.0] * 3]).double())
    run, logged, found = watch()
    assert found.untrained["brightness"] == pytest.approx(0.4)  # .1 from the teacher, beyond the tolerance
    warned = []
    for step, value in ((0, 0.42), (5, 0.0), (10, 0.45), (20, 0.37), (30, 0.36), (40, 0.47), (50, 0.61), (60, 0.55)):
        run.step = step
        caplog.clear()
        found.check(Network(value, 0.0))
        warned += [step] * (WORDS in caplog.text)
    assert warned == [20, 50]
    assert [figures["brightness"] for figures in logged] == pytest.approx([0.42, 0.45, 0.37, 0.36, 0.47, 0.61, 0.55])
    assert all(figures["teacher_brightness"] == pytest.approx(0.5) for figures in logged)
    assert logged[0].keys() == {"brightness", "saturation", "teacher_brightness", "teacher_saturation"}


def test_a_tolerance_above_the_untrained_students_distance_is_the_limit(watch, caplog):
    *_, found = watch(tolerance=0.2)
    found._fit = torch.tensor([[1.0] * 3, [0.0] * 3]).double()
    found.check(Network(0.32, 0.0))
    assert WORDS not in caplog.text
    found.check(Network(0.2, 0.0))
    assert f"Step 0: the brightness of {WORDS} to 0.200, the teacher's is 0.500 (`drift_tolerance` 0.2)" in caplog.text


def test_without_looks_nothing_is_drawn(watch, monkeypatch):
    monkeypatch.setattr(drift, "record_rollout", None)
    _, logged, found = watch(every=0)
    found.check(Network(0.0, 0.0))
    assert logged == []


def test_a_teacher_that_draws_no_numbers_is_named(watch):
    with pytest.raises(ValueError, match="what the teacher draws is not finite"):
        watch(guidance_scale=float("nan"))
