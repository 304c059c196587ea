"""Variants of TBCM for the study: what differs from TBCM, and that nothing else does."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import SanaPipeline
from distill_args import parse_args
from methods import TBCM

from benchmarks.paper.tbcm_variants import VARIANTS
from diffusers_tbcm.data.embeddings import PromptEncoder
from diffusers_tbcm.trigflow import TrigFlowTransformer
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


@pytest.fixture(scope="module")
def pipeline():
    return SanaPipeline.from_pretrained(TEACHER_DIR)


@pytest.fixture
def record(pipeline, tmp_path):
    """The recording of four draws by a method's rows."""

    def record(method):
        args = parse_args(flags(tmp_path), method=method)
        teacher = TrigFlowTransformer(pipeline.transformer, 0.001)
        encoder = PromptEncoder(pipeline, max_sequence_length=LENGTH)
        data = method.rows.load_data(args)
        rows = method.rows(args, Accelerator(), teacher, TEACHER_DIR, encoder, data, (16, 8, 8), sigma_data=0.5)
        return rows.record([0, 1, 2, 3])[0]

    return record


def test_one_route_gives_a_batch_the_timesteps_of_its_first_prompt(record):
    ours, variant = record(TBCM), record(VARIANTS["one_route"])
    expected = ours.trajectory.timesteps[[0, 0, 2, 2]]
    torch.testing.assert_close(variant.trajectory.timesteps, expected)
    torch.testing.assert_close(variant.trajectory.latents[[0, 2]], ours.trajectory.latents[[0, 2]])
    assert (ours.trajectory.timesteps[1] != expected[1]).all()


def test_prompt_mask_guides_by_the_padded_empty_prompt(record, pipeline):
    ours, variant = record(TBCM), record(VARIANTS["prompt_mask"])
    torch.testing.assert_close(variant.trajectory.timesteps, ours.trajectory.timesteps)
    assert not torch.allclose(variant.trajectory.latents, ours.trajectory.latents, atol=1e-3)

    # The velocity at the first recorded point, from the definition: two calls of the transformer.
    empty, *_ = pipeline.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    teacher, index = TrigFlowTransformer(pipeline.transformer, 0.001), 1
    mask = variant.prompt_attention_mask[index : index + 1]
    inputs = (variant.trajectory.latents[index, :1] / 0.5, variant.trajectory.timesteps[index, :1])
    with torch.no_grad():
        conditional = teacher(*inputs, variant.prompt_embeds[index : index + 1], mask)
        unconditional = teacher(*inputs, empty[:, : mask.shape[1]], mask)
    guided = unconditional + variant.guidance_scale[index] * (conditional - unconditional)
    torch.testing.assert_close(variant.trajectory.velocity[index, :1], 0.5 * guided, atol=1e-4, rtol=1e-4)
