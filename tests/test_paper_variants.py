"""Variants of TBCM for the study: what differs from TBCM, and that nothing else does."""

from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import SanaPipeline

from benchmarks.paper.tbcm_variants import VARIANTS
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import parse_settings
from diffusers_tbcm.trigflow import TrigFlowTransformer
from examples.tbcm import train_tbcm_distill as script
from examples.tbcm.mini_teacher.emoji_metrics import DISTILLATION_PROMPTS_FILE, TEACHER_DIR


LENGTH = 24


def flags(folder, **changes):
    values = {
        "pretrained_model_name_or_path": TEACHER_DIR,
        "prompts_file": TEACHER_DIR / DISTILLATION_PROMPTS_FILE,
        "output_dir": folder,
        "max_sequence_length": LENGTH,
        "train_batch_size": 2,
        "teacher_batch_size": 4,
        "route_steps": 4,
        "max_train_steps": 1,
        "report_to": "none",
        **changes,
    }
    return [
        "--no-complex_human_instruction",
        *(str(part) for item in values.items() for part in (f"--{item[0]}", item[1])),
    ]


class Begun(Exception):
    """Ends a run where its loop begins."""


@pytest.fixture(scope="module")
def pipeline():
    return SanaPipeline.from_pretrained(TEACHER_DIR)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The recording of four draws by the script, as it is or as a variant changes it."""

    def record(variant=None):
        recordings = []

        def batches(run, record, **options):
            recordings.append(record([0, 1, 2, 3])[0])
            raise Begun

        monkeypatch.setattr(Run, "batches", batches)
        settings = parse_settings(script.TBCMSettings, flags(tmp_path))
        with VARIANTS[variant](settings) if variant else nullcontext(), pytest.raises(Begun):
            script.train(settings, StopRequest())
        AcceleratorState._reset_state(reset_partial_state=True)
        return recordings[0]

    return record


def test_one_route_gives_a_batch_the_timesteps_of_its_first_prompt(record):
    ours, variant = record(), record("one_route")
    expected = ours.timesteps[[0, 0, 2, 2]]
    torch.testing.assert_close(variant.timesteps, expected)
    torch.testing.assert_close(variant.latents[[0, 2]], ours.latents[[0, 2]])
    assert (ours.timesteps[1] != expected[1]).all()


def test_prompt_mask_guides_by_the_padded_empty_prompt(record, pipeline):
    ours, variant = record(), record("prompt_mask")
    torch.testing.assert_close(variant.timesteps, ours.timesteps)
    assert not torch.allclose(variant.latents, ours.latents, atol=1e-3)

    # The velocity at the first recorded point, from the definition: two calls of the transformer.
    empty, *_ = pipeline.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    teacher, index = TrigFlowTransformer(pipeline.transformer), 1
    own = slice(index, index + 1)
    text = variant.text[own]
    inputs = (variant.latents[index, :1] / 0.5, variant.timesteps[index, :1])
    with torch.no_grad():
        conditional = teacher(*inputs, text.embeds, text.mask)
        unconditional = teacher(*inputs, empty[:, : text.mask.shape[1]], text.mask)
    guided = unconditional + variant.guidance_scale[index] * (conditional - unconditional)
    torch.testing.assert_close(variant.velocity[index, :1], 0.5 * guided, atol=1e-4, rtol=1e-4)
