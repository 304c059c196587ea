import inspect
import itertools
import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny import generate, tiny_sana_pipeline, tiny_tbcm_pipeline, tiny_transformer

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import INSTRUCTION


HALF_PI = math.pi / 2
PROMPT = "a red fox"
PROMPTS = ["a red fox", "the long and winding road to the northern harbour"]


@pytest.fixture(scope="module")
def shared_pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(shared_pipeline):
    """Fresh pipeline around shared components, for tests that only call it."""
    pipeline = SanaTBCMPipeline(**{**shared_pipeline.components, "scheduler": TBCMScheduler()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def own_pipeline():
    """Pipeline with components of its own, for tests that change them."""
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_of(pipeline) -> SanaSprintPipeline:
    stock = SanaSprintPipeline(**{**pipeline.components, "scheduler": SCMScheduler()})
    stock.set_progress_bar_config(disable=True)
    return stock


def generate_stock(stock, prompt=PROMPT, **arguments):
    arguments = {"max_timesteps": HALF_PI, "intermediate_timesteps": None, **arguments}
    return generate(stock, prompt, height=64, width=64, use_resolution_binning=False, **arguments)


# parity with diffusers


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_images_are_those_of_the_stock_pipeline(pipeline, steps):
    ours = generate(pipeline, num_inference_steps=steps)
    assert torch.equal(ours, generate_stock(stock_of(pipeline), num_inference_steps=steps))


def test_two_step_images_are_those_of_the_stock_pipeline(pipeline):
    stock = generate_stock(stock_of(pipeline), num_inference_steps=2, intermediate_timesteps=1.0)
    assert torch.equal(generate(pipeline, num_inference_steps=2), stock)
    assert torch.equal(generate(pipeline), stock)  # two steps are the default
    assert not torch.equal(generate(pipeline, intermediate_timesteps=1.3), stock)
    assert torch.equal(
        generate(pipeline, max_timesteps=1.5, intermediate_timesteps=1.3),
        generate_stock(stock_of(pipeline), max_timesteps=1.5, intermediate_timesteps=1.3),
    )


def test_every_default_of_the_stock_pipeline_is_ours(pipeline):
    arguments = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    ours = pipeline(PROMPT, num_inference_steps=1, **arguments).images
    arguments["generator"].manual_seed(0)
    time = {"num_inference_steps": 1, "max_timesteps": HALF_PI, "intermediate_timesteps": None}
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    assert np.array_equal(ours, stock_of(pipeline)(PROMPT, **time, **size, **arguments).images)

    signature, stock_signature = inspect.signature(pipeline.__call__), inspect.signature(SanaSprintPipeline.__call__)
    stock_arguments = list(stock_signature.parameters)[1:]  # self
    assert list(signature.parameters) == [*stock_arguments, "image", "strength"]


def test_a_call_draws_as_the_student_was_distilled_and_as_it_is_told(pipeline, tmp_path):
    trained = {"guidance_scale": 2.0, "height": 32, "width": 64, "max_sequence_length": 8}
    trained["complex_human_instruction"] = None
    record = {name: value for name, value in trained.items() if name != "guidance_scale"}
    scheduler = TBCMScheduler(guidance_scales=[1.5, 2.0, 40.0], call_options=record)
    student = SanaTBCMPipeline(**{**pipeline.components, "scheduler": scheduler})
    student.save_pretrained(tmp_path)
    student = SanaTBCMPipeline.from_pretrained(tmp_path)
    student.set_progress_bar_config(disable=True)
    assert student.default_call_options == trained

    def draw(pipeline, prompt=PROMPTS[1], **options):
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=1, generator=generator, output_type="pt", **options).images

    # Weights from a file lie elsewhere in memory, which may round a sum in another way
    def alike(first, second):
        return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=1e-5)

    assert alike(draw(student), draw(pipeline, **trained))
    for changed in (
        {"guidance_scale": 40.0},
        {"height": 64},
        {"width": 32},
        {"max_sequence_length": 32},
        {"complex_human_instruction": INSTRUCTION},
    ):
        told = draw(student, **changed)
        assert alike(told, draw(pipeline, **trained | changed))
        assert not alike(told, draw(student)), changed
    embeds, mask = student.encode_prompt(PROMPTS[1])
    assert embeds.shape[1] == 8
    embedded = draw(student, None, prompt_embeds=embeds, prompt_attention_mask=mask)
    assert torch.equal(embedded, draw(student))


def test_stock_pipeline_takes_our_scheduler(pipeline):
    stock = SanaSprintPipeline(**pipeline.components)
    stock.set_progress_bar_config(disable=True)
    images = generate(stock, height=64, width=64, use_resolution_binning=False)  # stock's default times
    assert torch.equal(images, generate(pipeline, timesteps=[HALF_PI, 1.3, 0.0]))


def test_binning_is_that_of_the_stock_pipeline(monkeypatch):
    # Sana's sample size and compression; the stock bins are shrunk to what the test can afford
    bins = {"1.0": [64.0, 64.0], "2.0": [96.0, 32.0]}
    monkeypatch.setattr("diffusers.pipelines.sana.pipeline_sana_sprint.ASPECT_RATIO_1024_BIN", bins)
    components = tiny_tbcm_pipeline().components
    components["transformer"] = tiny_transformer(guidance_embeds=True, sample_size=32)
    pipeline, stock = SanaTBCMPipeline(**components), stock_of(SanaTBCMPipeline(**components))
    pipeline.vae_scale_factor = 32  # latents are made for it; the tiny autoencoder still enlarges 8 times
    arguments = {"num_inference_steps": 1, "height": 100, "width": 51}
    ours = generate(pipeline, **arguments)
    stock.vae_scale_factor = 32
    time = {"max_timesteps": HALF_PI, "intermediate_timesteps": None}
    assert ours.shape == (1, 3, 100, 51)
    assert torch.equal(ours, generate(stock, **arguments, **time))

    pipeline.scheduler = TBCMScheduler(call_options={"height": 64, "width": 64})  # the bins are of another size
    small = generate(pipeline, num_inference_steps=1)
    assert torch.equal(
        small, generate(stock, height=64, width=64, use_resolution_binning=False, **time, num_inference_steps=1)
    )


# steps and times


def test_more_steps_are_other_images(pipeline):
    images = [generate(pipeline, num_inference_steps=steps) for steps in (1, 2, 3, 4, 8)]
    for image in images:
        assert image.shape == (1, 3, 64, 64) and image.std() > 0.05
    for one, other in itertools.pairwise(images):
        assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("convert", [list, torch.tensor])
def test_custom_timesteps_imply_the_number_of_steps(pipeline, convert):
    timesteps = convert([HALF_PI, 1.0, 0.0])
    expected = generate(pipeline, num_inference_steps=2)
    assert torch.equal(generate(pipeline, timesteps=timesteps), expected)
    assert torch.equal(generate(pipeline, timesteps=timesteps, num_inference_steps=2), expected)
    assert pipeline.num_timesteps == 2


def test_progress_bar_counts_steps(own_pipeline, capsys):
    own_pipeline.set_progress_bar_config(disable=False)
    generate(own_pipeline, timesteps=[HALF_PI, 1.0, 0.0])
    assert "2/2" in capsys.readouterr().err


def test_guidance_scale_reaches_the_student(pipeline):
    weak, strong = (generate(pipeline, num_inference_steps=1, guidance_scale=scale) for scale in (1.0, 5.0))
    assert not torch.allclose(weak, strong, atol=1e-4)


# sizes


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (8, 104)])
def test_any_size_that_the_models_divide(pipeline, height, width):
    assert generate(pipeline, num_inference_steps=1, height=height, width=width).shape == (1, 3, height, width)


def test_size_defaults_to_that_of_training(pipeline):
    components = {**pipeline.components, "transformer": tiny_transformer(guidance_embeds=True, sample_size=4)}
    assert generate(SanaTBCMPipeline(**components), num_inference_steps=1).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_binning_works_for_other_sample_sizes(pipeline, output_type):
    arguments = {"num_inference_steps": 1, "height": 50, "width": 101, "use_resolution_binning": True}
    latents = generate(pipeline, output_type="latent", **arguments)
    assert latents.shape == (1, 4, 6, 11)  # of 48 x 88 pixels: the bin 704 x 1408 of 1024-pixel Sana at 64 pixels
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.resize_and_crop_tensor((decoded / 2 + 0.5).clamp(0, 1), 101, 50)[0]
    assert expected.shape == (3, 50, 101)
    image = generate(pipeline, output_type=output_type, **arguments)[0]
    if output_type == "pt":
        assert torch.equal(image, expected)
    else:
        image = np.asarray(image) / (255 if output_type == "pil" else 1)
        rounding = 0.5 / 255 + 1e-6
        assert np.abs(image - expected.permute(1, 2, 0).numpy()).max() <= rounding
    with pytest.raises(ValueError, match="`height` is 50"):
        generate(pipeline, **{**arguments, "use_resolution_binning": False})


# batches and inputs


def test_batch_is_its_images_one_by_one(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    together = generate(pipeline, PROMPTS, num_inference_steps=3, generator=generators)
    for index, prompt in enumerate(PROMPTS):
        alone = generate(pipeline, prompt, num_inference_steps=3, seed=3 + index)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0)  # batched matmuls differ


def test_images_per_prompt_keep_their_prompts(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)]
    together = generate(pipeline, PROMPTS, num_inference_steps=2, num_images_per_prompt=2, generator=generators)
    for index, prompt in enumerate([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]):
        alone = generate(pipeline, prompt, num_inference_steps=2, seed=3 + index)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0)


def test_prompts_and_masks_are_repeated_alike(pipeline):
    arguments = {"max_sequence_length": 24, "complex_human_instruction": None}
    embeds, mask = pipeline.encode_prompt(PROMPTS, num_images_per_prompt=1, **arguments)
    assert mask[0].sum() < mask[1].sum()
    repeated_embeds, repeated_mask = pipeline.encode_prompt(PROMPTS, num_images_per_prompt=2, **arguments)
    assert torch.equal(repeated_embeds, embeds[[0, 0, 1, 1]])
    assert torch.equal(repeated_mask, mask[[0, 0, 1, 1]])
    stock_embeds, stock_mask = stock_of(pipeline).encode_prompt(PROMPTS, num_images_per_prompt=2, **arguments)
    assert torch.equal(stock_embeds, repeated_embeds)
    assert torch.equal(stock_mask, mask[[0, 1, 0, 1]])  # the bug that the override is for: drop it when this fails


def test_latents_are_taken_as_noise(pipeline):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 1}
    expected = generate(pipeline, seed=0, **arguments)
    assert torch.equal(generate(pipeline, seed=1, latents=latents, **arguments), expected)


@pytest.mark.parametrize("stochastic_sampling", [True, False])
def test_the_first_noise_alone_decides_where_the_scheduler_draws_none(pipeline, stochastic_sampling):
    pipeline.scheduler = TBCMScheduler(stochastic_sampling=stochastic_sampling)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [generate(pipeline, seed=seed, latents=latents, num_inference_steps=3) for seed in (0, 1)]
    assert torch.equal(*images) is not stochastic_sampling


def test_prompt_embeds_replace_the_prompt(pipeline):
    embeds, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=32)
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    assert torch.equal(
        generate(pipeline, None, num_images_per_prompt=2, **given),
        generate(pipeline, PROMPTS, num_images_per_prompt=2),
    )


def test_complex_human_instruction_is_sanas(pipeline):
    assert INSTRUCTION[-1] == "User Prompt: "
    arguments = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0)}
    with_instruction = generate(pipeline, complex_human_instruction=INSTRUCTION, **arguments)
    assert not torch.equal(with_instruction, generate(pipeline, num_inference_steps=1))


def test_callback_sees_and_changes_every_step(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep.item(), sorted(tensors), pipe.num_timesteps))
        tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    arguments = {"num_inference_steps": 3, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    changed = generate(pipeline, callback_on_step_end=callback, **arguments)
    angles = torch.linspace(HALF_PI, 0, 4).tolist()
    assert seen == [(step, angles[step], ["latents", "prompt_embeds"], 3) for step in range(3)]
    assert not torch.equal(changed, generate(pipeline, num_inference_steps=3))


def test_every_step_shows_what_it_expects(pipeline):
    seen = []

    def preview(pipe, step, timestep, tensors):
        seen.append(tensors["denoised"])
        return {}

    arguments = {"callback_on_step_end": preview, "callback_on_step_end_tensor_inputs": ["denoised"]}
    images = generate(pipeline, num_inference_steps=3, **arguments)
    assert torch.equal(images, generate(pipeline, num_inference_steps=3))  # looking changes nothing
    assert torch.equal(pipeline.decode_latents(seen[-1], output_type="pt"), images)
    one_step = generate(pipeline, num_inference_steps=1)  # the same first step
    assert torch.equal(pipeline.decode_latents(seen[0], output_type="pt"), one_step)
    pictures = pipeline.decode_latents(seen[0])
    assert [picture.size for picture in pictures] == [(64, 64)] and isinstance(pictures[0], Image.Image)


def test_guidance_beyond_what_was_distilled_is_warned_of_once(pipeline, caplog):
    for scale in (0.5, 9.0):
        generate(pipeline, num_inference_steps=1, guidance_scale=scale)
    assert not caplog.records  # this checkpoint does not say what it was distilled at
    pipeline.scheduler = TBCMScheduler(guidance_scales=[4.0, 5.0, 4.5])
    for scale in (4.0, 4.2, 5.0):
        generate(pipeline, num_inference_steps=1, guidance_scale=scale)
    assert not caplog.records
    for scale in (5.5, 3.0):
        generate(pipeline, num_inference_steps=1, guidance_scale=scale)
    (record,) = caplog.records
    assert "`guidance_scale` is 5.5, but this student was distilled at 4.0 to 5.0" in record.message


def test_output_types_agree(pipeline):
    tensor = generate(pipeline, num_inference_steps=1)
    array = generate(pipeline, num_inference_steps=1, output_type="np")
    image = generate(pipeline, num_inference_steps=1, output_type="pil")[0]
    latents = generate(pipeline, num_inference_steps=1, output_type="latent")
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert isinstance(image, Image.Image) and image.size == (64, 64)
    assert np.abs(np.asarray(image) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), tensor)
    generator = torch.Generator().manual_seed(0)
    arguments = {"complex_human_instruction": None, "max_sequence_length": 32, "output_type": "pt"}
    (as_tuple,) = pipeline(PROMPT, 1, generator=generator, return_dict=False, **arguments)
    assert torch.equal(as_tuple, tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": 3, "timesteps": [1.5, 1.0, 0.0]}, "`num_inference_steps` is 3"),
        ({"timesteps": [1.5, 1.0]}, r"`timesteps` is \[1.5, 1.0\].* final 0"),
        ({"timesteps": [1.5, 0.0], "max_timesteps": 1.5}, "`max_timesteps` is 1.5"),
        ({"num_inference_steps": 4, "intermediate_timesteps": 1.3}, "`intermediate_timesteps` is 1.3"),
        ({"height": 60}, "`height` is 60, but has to be a positive multiple of 8"),
        ({"width": 100}, "`width` is 100, but has to be a positive multiple of 8"),
        ({"height": 0}, "`height` is 0"),
        ({"prompt": None}, "Provide either `prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 4, 16)}, "Cannot forward both `prompt`"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 16)}, "Must provide `prompt_attention_mask`"),
        ({"callback_on_step_end_tensor_inputs": ["nonsense"]}, r"found \['nonsense'\]"),
        ({"generator": [torch.Generator()] * 3}, "list of generators of length 3"),
    ],
)
def test_bad_calls_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, **{"prompt": PROMPT, **arguments})


def test_sizes_are_multiples_of_the_patches_too(pipeline):
    transformer = tiny_transformer(guidance_embeds=True, patch_size=2)
    pipeline = SanaTBCMPipeline(**{**pipeline.components, "transformer": transformer})
    assert generate(pipeline, num_inference_steps=1, height=48).shape == (1, 3, 48, 64)
    with pytest.raises(ValueError, match="`height` is 40, but has to be a positive multiple of 16"):
        generate(pipeline, height=40)


def test_a_teacher_is_refused(pipeline):
    teacher = SanaTBCMPipeline(**{**pipeline.components, "transformer": tiny_transformer()})
    with pytest.raises(ValueError, match=r"`transformer\.config\.guidance_embeds` is False"):
        generate(teacher)
    scaled = tiny_transformer(guidance_embeds=True, timestep_scale=1000.0)
    with pytest.raises(ValueError, match=r"`transformer\.config\.timestep_scale` is 1000"):
        generate(SanaTBCMPipeline(**{**pipeline.components, "transformer": scaled}))


# loading and saving

LOADED = {"atol": 1e-5, "rtol": 0}  # loaded weights are aligned otherwise in memory, and kernels sum in another order


def assert_same_weights(one, other):
    for name in ("transformer", "vae", "text_encoder"):
        state, other_state = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        assert state.keys() == other_state.keys()
        assert all(torch.equal(state[key], other_state[key]) for key in state)


def test_saved_pipeline_comes_back(own_pipeline, tmp_path):
    own_pipeline.scheduler = TBCMScheduler(timesteps_by_steps={"2": [HALF_PI, 0.8, 0.0]}, stochastic_sampling=False)
    own_pipeline.save_pretrained(tmp_path)
    loaded = SanaTBCMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is SanaTBCMPipeline and type(loaded.scheduler) is TBCMScheduler
    assert loaded.scheduler.config.timesteps_by_steps == {"2": [HALF_PI, 0.8, 0.0]}
    assert not loaded.scheduler.config.stochastic_sampling
    assert_same_weights(loaded, own_pipeline)
    torch.testing.assert_close(generate(loaded), generate(own_pipeline), **LOADED)
    assert type(own_pipeline.scheduler) is TBCMScheduler  # saving changes nothing


def test_saved_pipeline_needs_no_package(own_pipeline, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    own_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    assert index["scheduler"] == ["diffusers", "SCMScheduler"]
    assert index["tokenizer"] == ["transformers", "GemmaTokenizerFast"]  # as every version of transformers knows it
    assert not any("diffusers_tbcm" in path.read_text() for path in tmp_path.rglob("*.json"))
    caplog.clear()
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    assert "not expected" not in caplog.text  # what the stock scheduler does not know
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is SanaSprintPipeline and type(plain.scheduler) is SCMScheduler
    images = generate_stock(plain, num_inference_steps=2, intermediate_timesteps=1.0)
    torch.testing.assert_close(images, generate(own_pipeline), **LOADED)


def test_stock_folder_loads(own_pipeline, tmp_path):
    stock_of(own_pipeline).save_pretrained(tmp_path)
    loaded = SanaTBCMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is TBCMScheduler
    assert_same_weights(loaded, own_pipeline)
    torch.testing.assert_close(generate(loaded), generate(own_pipeline), **LOADED)


def test_from_pipe_shares_the_weights(own_pipeline):
    stock = stock_of(own_pipeline)
    addresses = [weight.data_ptr() for weight in stock.transformer.parameters()]
    pipeline = SanaTBCMPipeline.from_pipe(stock)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "tokenizer"):
        assert getattr(pipeline, name) is getattr(stock, name)
    assert [weight.data_ptr() for weight in pipeline.transformer.parameters()] == addresses
    assert type(stock.scheduler) is SCMScheduler
    assert torch.equal(generate(pipeline), generate(own_pipeline))
    assert type(SanaSprintPipeline.from_pipe(pipeline)) is SanaSprintPipeline


def test_from_pipe_keeps_the_precision(own_pipeline):
    stock = stock_of(own_pipeline).to(torch.bfloat16)
    stock.vae.float()
    addresses = [weight.data_ptr() for weight in stock.transformer.parameters()]
    pipeline = SanaTBCMPipeline.from_pipe(stock)  # the stock method casts both pipelines to float32
    assert (pipeline.transformer.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
    assert [weight.data_ptr() for weight in stock.transformer.parameters()] == addresses
    assert SanaTBCMPipeline.from_pipe(stock, torch_dtype=torch.float32).transformer.dtype == torch.float32


def test_from_pipe_keeps_the_checkpoints_own_entries(own_pipeline, tmp_path):
    own_pipeline.scheduler = TBCMScheduler(timesteps_by_steps={"2": [HALF_PI, 0.8, 0.0]}, guidance_scales=[4.0, 5.0])
    own_pipeline.save_pretrained(tmp_path)
    config = SanaTBCMPipeline.from_pipe(DiffusionPipeline.from_pretrained(tmp_path)).scheduler.config
    assert config.timesteps_by_steps == {"2": [HALF_PI, 0.8, 0.0]} and config.guidance_scales == [4.0, 5.0]


def test_student_takes_the_place_of_a_teacher():
    teacher, student = tiny_sana_pipeline(), tiny_transformer(guidance_embeds=True)
    pipeline = SanaTBCMPipeline.from_pipe(teacher, transformer=student)
    assert type(pipeline.scheduler) is TBCMScheduler  # the teacher's sampler cannot sample from it
    assert generate(pipeline).shape == (1, 3, 64, 64)
    assert type(teacher) is SanaPipeline and type(teacher.scheduler) is FlowMatchEulerDiscreteScheduler
    with pytest.raises(ValueError, match="`scheduler` is a FlowMatchEulerDiscreteScheduler"):
        SanaTBCMPipeline.from_pipe(teacher, transformer=student, scheduler=teacher.scheduler)
    with pytest.raises(ValueError, match=r"`transformer\.config\.guidance_embeds` is False"):
        generate(SanaTBCMPipeline.from_pipe(teacher))


def test_prompts_can_be_encoded_without_the_rest(pipeline):
    rest = {"vae": None, "transformer": None, "scheduler": None}
    encoder = SanaTBCMPipeline(**{**pipeline.components, **rest})
    embeds, mask = encoder.encode_prompt(PROMPT, max_sequence_length=32)
    without = SanaTBCMPipeline(**{**pipeline.components, "text_encoder": None, "tokenizer": None})
    without.set_progress_bar_config(disable=True)
    images = generate(without, None, prompt_embeds=embeds, prompt_attention_mask=mask)
    assert torch.equal(images, generate(pipeline))


# memory and adapters


def test_vae_slicing_and_tiling(own_pipeline):
    arguments = {"num_inference_steps": 1, "height": 64, "width": 96}
    expected = generate(own_pipeline, PROMPTS, **arguments)
    own_pipeline.vae.enable_slicing()
    torch.testing.assert_close(generate(own_pipeline, PROMPTS, **arguments), expected, atol=1e-5, rtol=0)
    own_pipeline.vae.enable_tiling(
        tile_sample_min_height=64, tile_sample_min_width=64, tile_sample_stride_height=48, tile_sample_stride_width=48
    )
    tiled = generate(own_pipeline, PROMPTS, **arguments)
    assert tiled.shape == expected.shape
    assert not torch.allclose(tiled, expected, atol=1e-3)  # tiles do not see one another
    assert (tiled - expected).abs().mean() < expected.std()


def test_bfloat16(own_pipeline):
    expected = generate(own_pipeline, num_inference_steps=2)
    image = generate(own_pipeline.to(torch.bfloat16), num_inference_steps=2)
    assert (image.float() - expected).abs().mean() < 0.05  # eight bits of mantissa through two passes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers offloads from an accelerator only")
def test_model_cpu_offload(own_pipeline):
    expected = generate(own_pipeline.to("cuda"), num_inference_steps=2)
    own_pipeline.to("cpu").enable_model_cpu_offload()
    torch.testing.assert_close(generate(own_pipeline, num_inference_steps=2), expected, atol=1e-4, rtol=0)


def test_lora_is_saved_loaded_and_fused(own_pipeline, tmp_path):
    base = generate(own_pipeline)
    trained = tiny_transformer(guidance_embeds=True)
    torch.manual_seed(1)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    trained.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=attention))
    SanaTBCMPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(trained))
    expected = generate(SanaTBCMPipeline(**{**own_pipeline.components, "transformer": trained}))
    assert not torch.allclose(expected, base, atol=1e-3)

    own_pipeline.load_lora_weights(tmp_path)
    assert isinstance(own_pipeline.transformer, SanaTransformer2DModel)
    torch.testing.assert_close(generate(own_pipeline), expected, **LOADED)
    scaled = generate(own_pipeline, attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(scaled, base, atol=1e-5, rtol=0)
    own_pipeline.fuse_lora()
    torch.testing.assert_close(generate(own_pipeline), expected, atol=1e-4, rtol=0)  # weights are summed before use
    own_pipeline.unfuse_lora()
    own_pipeline.unload_lora_weights()
    torch.testing.assert_close(generate(own_pipeline), base, atol=1e-5, rtol=0)


def test_encode_prompt_names_what_it_returns_as_diffusers_reads_it():
    """diffusers' `test_encode_prompt_works_in_isolation` reads the returned names from the last line of the source."""
    returned = inspect.getsource(SanaTBCMPipeline.encode_prompt).split("return")[-1].strip().split(", ")
    assert returned == ["prompt_embeds", "prompt_attention_mask"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipeline_in_one_file_that_is_not_ours_is_left_alone(linked, tmp_path):
    pipeline, folder, notes = tiny_tbcm_pipeline(), tmp_path / "student", tmp_path / "notes.py"
    folder.mkdir()
    notes.write_text("print('mine')\n")
    if linked:
        (folder / "pipeline.py").symlink_to(notes)
    else:
        shutil.copy(notes, folder / "pipeline.py")
    with pytest.raises(ValueError, match=r"`save_directory` holds a pipeline\.py that this package did not write"):
        pipeline.save_pretrained(folder)
    assert (folder / "pipeline.py").read_text() == notes.read_text() == "print('mine')\n"
    assert len(list(folder.iterdir())) == 1
    (folder / "pipeline.py").unlink()
    for _ in range(2):  # its own is replaced
        pipeline.save_pretrained(folder)
