"""What FLUX.1-dev alone has: guidance as an input, which students are told as 1."""

import pytest
import torch
from families import tiny_flux

from diffusers_tbcm.backbones import flux
from diffusers_tbcm.export.folders import save_flow_student
from diffusers_tbcm.export.record import StudentDescription
from diffusers_tbcm.flow import FlowTransformer
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler
from diffusers_tbcm.text import Text


def test_a_student_is_told_1_and_a_teacher_its_guidance():
    network = FlowTransformer(tiny_flux().transformer.requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    text = Text.unmasked(torch.randn(2, 5, 32, generator=generator), torch.randn(2, 16, generator=generator))
    inputs = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.3, 0.8])
    untold, told, guided = (
        network(*inputs, **text.arguments(), guidance=guidance)
        for guidance in (None, torch.ones(2), torch.tensor([1.0, 3.5]))
    )
    assert torch.equal(untold, told)
    assert torch.equal(guided[0], told[0]) and not torch.allclose(guided[1], told[1], atol=1e-3)


def test_a_network_that_takes_no_guidance_is_refused(tmp_path):
    transformer = tiny_flux(guidance_embeds=False).transformer  # as of FLUX.1-schnell
    transformer.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"takes no guidance, as a FLUX\.1-schnell: give a FLUX\.1-dev"):
        flux.load_transformer(tmp_path)


def test_longer_prompts_than_the_stock_pipeline_allows_are_refused(tmp_path):
    assert flux.prompt_tokens(tmp_path, None) == flux.prompt_tokens(tmp_path, 512) == 512
    with pytest.raises(ValueError, match="`max_sequence_length` is 513: this teacher's pipeline reads 512 tokens"):
        flux.prompt_tokens(tmp_path, 513)


@pytest.mark.parametrize("tokens", [300, 512])
def test_a_card_names_the_tokens_that_the_stock_call_would_not_read(tokens, tmp_path):
    """300 are what another family's pipeline reads by default."""
    tiny_flux().save_pretrained(tmp_path / "teacher")
    scheduler = FlowStudentScheduler(3.0, {"height": 64, "width": 64, "max_sequence_length": tokens})
    description = StudentDescription("a dog", {"steps": 1}, resolution=64)
    student = tiny_flux().transformer
    save_flow_student(student, tmp_path / "teacher", tmp_path / "student", description, scheduler=scheduler)
    card = (tmp_path / "student" / "README.md").read_text()
    assert ('options["max_sequence_length"] = 300' in card) is (tokens == 300)
    assert "options = dict(guidance_scale=1.0, height=64, width=64)" in card
