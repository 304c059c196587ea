"""The one way to draw pictures: of prompts or their embeddings, in batches, each from a generator of its own."""

from itertools import islice

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SanaPipeline
from safetensors.torch import load_file, save_file
from tiny import (
    tiny_sana_pipeline,
    tiny_tbcm_pipeline,
    tiny_transformer,
    tiny_vae,
    write_tiny_flow_lora,
    write_tiny_flow_student,
    write_tiny_pipeline,
)

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import INSTRUCTION
from diffusers_tbcm.draws import draw_generator
from diffusers_tbcm.evaluation.drawing import (
    call_options,
    draw,
    draw_pictures,
    has_learned_guidance,
    load_pipeline,
    numbered_generators,
)
from diffusers_tbcm.export.folders import save_student_lora
from diffusers_tbcm.export.record import StudentDescription
from diffusers_tbcm.lora import LORA_FILE, make_lora_student
from diffusers_tbcm.text import Text


PROMPTS = ["a dog", "a violin", "three little birds"]
READING = {"complex_human_instruction": None, "max_sequence_length": 16}
SEED = 3


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


def called(pipeline, places, **arguments):
    """The pipeline's own call for the prompts of some places."""
    generators = [draw_generator(place, SEED) for place in places]
    return pixels(pipeline(num_inference_steps=2, generator=generators, **arguments).images)


def test_pictures_are_those_of_the_pipelines_call_bit_for_bit(pipeline):
    found = pixels(draw_pictures(pipeline, PROMPTS, numbered_generators(SEED), num_inference_steps=2, **READING))
    assert np.array_equal(found, called(pipeline, range(3), prompt=PROMPTS, **READING))
    assert len(np.unique(found.reshape(3, -1), axis=0)) == 3


def test_a_batch_is_a_call_and_its_generators_go_on_where_the_last_ended(pipeline):
    drawn = draw_pictures(pipeline, PROMPTS, numbered_generators(SEED), num_inference_steps=2, batch_size=2, **READING)
    batches = [called(pipeline, places, prompt=[PROMPTS[i] for i in places], **READING) for places in ([0, 1], [2])]
    assert np.array_equal(pixels(drawn), np.concatenate(batches))


def test_a_batch_is_drawn_when_its_first_picture_is_asked_for(pipeline, monkeypatch):
    calls = []
    call = type(pipeline).__call__
    monkeypatch.setattr(type(pipeline), "__call__", lambda self, **kw: calls.append(kw["prompt"]) or call(self, **kw))
    drawn = draw_pictures(pipeline, PROMPTS, numbered_generators(0), num_inference_steps=1, batch_size=2, **READING)
    assert calls == []
    assert len(list(islice(drawn, 2))) == 2 and calls == [PROMPTS[:2]]
    assert len(list(drawn)) == 1 and calls == [PROMPTS[:2], PROMPTS[2:]]
    assert list(draw_pictures(pipeline, [], [], num_inference_steps=1)) == [] and len(calls) == 2


@pytest.mark.parametrize("batch_size", [None, 2])
def test_embeddings_are_drawn_as_their_prompts_are(pipeline, batch_size):
    embeds, mask, *_ = pipeline.encode_prompt(PROMPTS, **READING)
    text = Text(embeds, mask)
    options = {"num_inference_steps": 2, "batch_size": batch_size}
    from_text = pixels(draw_pictures(pipeline, text, numbered_generators(SEED), **options))
    from_prompts = pixels(draw_pictures(pipeline, PROMPTS, numbered_generators(SEED), **options, **READING))
    assert np.abs(from_text.astype(int) - from_prompts).max() <= 1  # embedded together or in batches: rounding


def test_a_teachers_pipeline_draws_too():
    teacher = tiny_sana_pipeline()
    teacher.set_progress_bar_config(disable=True)
    options = {**READING, "height": 64, "width": 64, "use_resolution_binning": False, "guidance_scale": 3.0}
    found = pixels(draw_pictures(teacher, PROMPTS, numbered_generators(SEED), num_inference_steps=2, **options))
    assert np.array_equal(found, called(teacher, range(3), prompt=PROMPTS, **options))


def test_generators_are_numbered_by_place():
    for place, generator in enumerate(islice(numbered_generators(SEED), 3)):
        assert torch.equal(torch.randn(4, generator=generator), torch.randn(4, generator=draw_generator(place, SEED)))


def test_drawings_come_by_prompt_then_steps_then_seed_each_as_if_alone(pipeline):
    drawings = list(draw(pipeline, PROMPTS[:2], steps=[1, 2], seeds=[0, 5], **READING))
    keys = [(drawing.prompt, drawing.num_inference_steps, drawing.seed) for drawing in drawings]
    assert keys == [(prompt, steps, seed) for prompt in PROMPTS[:2] for steps in (1, 2) for seed in (0, 5)]
    for drawing in drawings:
        generator = torch.Generator().manual_seed(drawing.seed)
        alone = pipeline(
            drawing.prompt, num_inference_steps=drawing.num_inference_steps, generator=generator, **READING
        )
        assert np.array_equal(drawing.image, alone.images[0]) and drawing.seconds > 0


def test_a_half_precision_variant_is_loaded_where_it_is_asked_for(tmp_path):
    half = tiny_tbcm_pipeline().to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant="bf16", max_shard_size="5KB")
    loaded = load_pipeline(tmp_path, variant="bf16", device="cpu")
    for name in ("transformer", "text_encoder", "vae"):
        for found, weight in zip(getattr(loaded, name).parameters(), getattr(half, name).parameters(), strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, weight.float())
    with pytest.raises((OSError, ValueError), match=r"no file named|model files|variant"):
        load_pipeline(tmp_path, device="cpu")


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize(
    "write", [lambda folder: tiny_tbcm_pipeline().save_pretrained(folder), write_tiny_flow_student]
)
def test_a_model_that_lacks_a_weight_does_not_draw_with_a_random_one(write, component, tmp_path):
    write(tmp_path)
    (file,) = (tmp_path / component).glob("*.safetensors")
    name, *others = sorted(weights := load_file(file))
    save_file({other: weights[other] for other in others}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"model .*'{component}' cannot be loaded: it lacks 1 .*, such as {name}"):
        load_pipeline(tmp_path, device="cpu")


@pytest.fixture(scope="module")
def flow_student(tmp_path_factory):
    return write_tiny_flow_student(tmp_path_factory.mktemp("flow"), width=32)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_flow_student_is_drawn_as_plain_diffusers_draws_it_with_the_right_times(flow_student, steps):
    pipeline = load_pipeline(flow_student, device="cpu")
    assert type(pipeline) is SanaPipeline and has_learned_guidance(pipeline)
    found = pixels(
        draw_pictures(
            pipeline, PROMPTS, numbered_generators(SEED), num_inference_steps=steps, **call_options(pipeline)
        )
    )
    plain = DiffusionPipeline.from_pretrained(flow_student)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        PROMPTS,
        sigmas=[1 - step / steps for step in range(steps)],
        guidance_scale=1.0,
        generator=[draw_generator(place, SEED) for place in range(3)],
        height=64,
        width=32,
        use_resolution_binning=False,
        **READING,
    ).images
    assert found.shape == (3, 64, 32, 3) and np.array_equal(found, pixels(expected))


def test_a_call_is_as_the_student_was_distilled_unless_it_is_told(flow_student):
    flow, consistency = load_pipeline(flow_student, device="cpu"), tiny_tbcm_pipeline()
    consistency.scheduler = TBCMScheduler(guidance_scales=[2.0], call_options=READING)
    size = {"height": 64, "width": 64}
    assert call_options(consistency) == {**size, "guidance_scale": 2.0, **READING}
    own = {"height": 64, "width": 32, "guidance_scale": 1.0, "use_resolution_binning": False, **READING}
    assert call_options(flow) == own == call_options(flow, guidance_scale=1, height=None)
    told = {"height": 32, "max_sequence_length": 20}
    with_instruction = {**told, "complex_human_instruction": INSTRUCTION}
    assert call_options(flow, **told, complex_human_instruction=True) == {**own, **with_instruction}
    assert call_options(consistency, **told, guidance_scale=0.5, complex_human_instruction=False) == {
        **size, **READING, **told, "guidance_scale": 0.5
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"`guidance_scale` is 4.5, but this student has learned its guidance"):
        call_options(flow, guidance_scale=4.5)


def test_infinity_is_no_picture_of_a_flow_student(tmp_path):
    folder, vae = write_tiny_flow_student(tmp_path / "student"), tiny_vae()
    vae.decoder.conv_out.bias.data[0] = torch.inf  # which the stock pipeline shows as white
    vae.save_pretrained(folder / "vae")
    loaded = load_pipeline(folder, device="cpu")
    with pytest.raises(ValueError, match="picture of 'a dog' at 1 step is not finite"):
        next(draw(loaded, PROMPTS, steps=[1], seeds=[0], **call_options(loaded)))


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001], ids=["plain time", "dense time"])
def test_a_flow_lora_makes_a_student_of_its_teacher_as_plain_diffusers_does(tmp_path, timestep_scale):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    folder = write_tiny_flow_lora(tmp_path / "lora", teacher, timestep_scale=timestep_scale)
    plain = SanaPipeline.from_pretrained(teacher)
    plain.load_lora_weights(folder)
    plain.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain.transformer.register_to_config(timestep_scale=timestep_scale)
    plain.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "use_resolution_binning": False, "guidance_scale": 1.0, **READING}
    generator = torch.Generator().manual_seed(SEED)
    expected = plain("a dog", sigmas=[1.0, 0.75, 0.5, 0.25], generator=generator, **options).images
    for lora in (folder, folder / LORA_FILE):
        pipeline = load_pipeline(teacher, lora=lora, device="cpu")
        assert call_options(pipeline) == options
        drawn = draw(pipeline, ["a dog"], steps=[4], seeds=[SEED], **call_options(pipeline))
        assert np.array_equal(pixels(drawing.image for drawing in drawn), pixels(expected))


def test_a_students_lora_is_loaded_into_a_teacher_and_a_style_into_any_student(tmp_path, flow_student):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    flow_lora = write_tiny_flow_lora(tmp_path / "flow_lora", teacher)
    consistency_lora = save_student_lora(
        make_lora_student(tiny_transformer(), rank=2), teacher, tmp_path / "tbcm_lora", StudentDescription("a dog", {})
    )
    tiny_tbcm_pipeline().save_pretrained(tmp_path / "tbcm")
    for model, lora in (
        (flow_student, flow_lora),
        (flow_student, consistency_lora),
        (tmp_path / "tbcm", flow_lora),
    ):
        with pytest.raises(ValueError, match="is a student already: give the teacher, 'teacher'"):
            load_pipeline(model, lora=lora, device="cpu")
    assert isinstance(load_pipeline(teacher, lora=consistency_lora, device="cpu"), SanaTBCMPipeline)
    (flow_lora / "training.json").unlink()  # as of a style, which says nothing of students
    styled = load_pipeline(flow_student, lora=flow_lora, device="cpu")
    assert has_learned_guidance(styled) and styled.get_active_adapters()
    (flow_lora / "training.json").write_text('{"adapter": {"scheduler": "FlowMatchEulerDiscreteScheduler"}}')
    with pytest.raises(ValueError, match=r"^lora .* cannot be loaded: KeyError 'shift'$"):
        load_pipeline(teacher, lora=flow_lora, device="cpu")


def test_what_is_no_student_is_said_to_be_neither_kind(tmp_path, flow_student):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    with pytest.raises(ValueError, match="is no few-step student, neither TBCM's nor CDM's: give one, or the LoRA"):
        load_pipeline(teacher, device="cpu")
    with pytest.raises(ValueError, match=r"student of CDM, which `DiffusionPipeline.from_pretrained` loads"):
        SanaTBCMPipeline.from_pretrained(flow_student)
    config = flow_student / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    config.write_text(before[:20])
    with pytest.raises(ValueError, match=r"^model .* cannot be loaded: [^\n]*$"):
        load_pipeline(flow_student, device="cpu")
    config.write_text(before)
