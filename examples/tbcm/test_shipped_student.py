"""The student that the repository holds: its weight, its parts, and that it draws what its teacher draws."""

import torch
from PIL import ImageOps

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.evaluation.features import MobileNetFeatures
from diffusers_tbcm.export.record import load_metrics
from diffusers_tbcm.pipeline_folder import TRANSFORMER
from examples.tbcm.quickstart import GRID_PROMPTS, TEACHER_DIR, TEACHER_STEPS, draw, load_controls


STUDENT_DIR = TEACHER_DIR.with_name("sana_emoji_mini_tbcm")
MAX_BYTES = 15_000_000  # of its network


def test_it_is_small_and_has_its_teachers_other_parts():
    weights = STUDENT_DIR / TRANSFORMER / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= MAX_BYTES
    for part in ("vae", "text_encoder", "tokenizer"):
        for file in (TEACHER_DIR / part).iterdir():
            assert (STUDENT_DIR / part / file.name).read_bytes() == file.read_bytes(), file
    assert load_metrics(STUDENT_DIR) is not None


def test_in_its_two_steps_it_draws_the_teachers_pictures_or_their_mirror_images():
    """To a picture alone, a mean of it and its mirror image is nearer than the mirror image; and in pixels a blurred
    picture is nearer than one that is crisp, hence the features."""
    controls, extractor = load_controls("cpu"), MobileNetFeatures()
    student = SanaTBCMPipeline.from_pretrained(STUDENT_DIR)
    wanted = draw(controls["teacher"], GRID_PROMPTS, TEACHER_STEPS)
    either = torch.stack([extractor.extract(wanted), extractor.extract([ImageOps.mirror(one) for one in wanted])])

    def error(pipeline):
        drawn = extractor.extract(draw(pipeline, GRID_PROMPTS, 2))
        return (drawn - either).square().mean(2).amin(0).mean()

    assert error(student) < 0.6 * error(controls["untrained student"])
