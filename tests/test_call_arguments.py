"""What cannot be drawn is refused by name; what NumPy and torch call a number is one."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from PIL import Image
from tiny import generate, tiny_tbcm_pipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.call_arguments import real_number, whole_number


HALF_PI = math.pi / 2
NAN, INF = math.nan, math.inf
EMBEDS, MASK = torch.ones(1, 4, 16), torch.ones(1, 4)
NOISE = torch.zeros(1, 4, 8, 8)
PICTURE = Image.new("RGB", (64, 64))


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeds(prompt_embeds=EMBEDS, prompt_attention_mask=MASK):
    return {"prompt": None, "prompt_embeds": prompt_embeds, "prompt_attention_mask": prompt_attention_mask}


def returning(value):
    return {"callback_on_step_end": lambda *_: value}


BAD_CALLS = [
    *(({"prompt": prompt}, "`prompt") for prompt in ([], [None], ["a dog", 3], ("a dog",), 5, [["a dog"]], b"a dog")),
    *(
        ({name: value}, f"`{name}` is ")
        for name in ("num_inference_steps", "num_images_per_prompt", "max_sequence_length", "height", "width")
        for value in (0, -1, True, 2.0, "2", [2], NAN, np.float32(2), torch.tensor([2, 2]))
    ),
    ({"num_images_per_prompt": None}, "`num_images_per_prompt` is None"),
    ({"max_sequence_length": 100_000}, "`max_sequence_length` is 100000, but `text_encoder` reads at most 8192"),
    *(({"prompt": prompt}, r"`prompt.* is .*no text in UTF-8") for prompt in ("caf\udce9", ["a dog", "\ud800"])),
    ({"complex_human_instruction": ["\ud800"]}, "`complex_human_instruction` is .*no text in UTF-8"),
    *(({"guidance_scale": value}, "`guidance_scale` is ") for value in (1e300, -1e300, 10**400)),
    *(
        ({name: value}, f"`{name}` is ")
        for name in ("guidance_scale", "eta", "max_timesteps", "intermediate_timesteps")
        for value in (NAN, INF, -INF, "4.5", [4.5, 5.0], True, 1j, np.float64(NAN), torch.tensor(NAN))
    ),
    *(
        ({"timesteps": value}, "`timesteps` is ")
        for value in (
            [], [0.0], [1.0, 1.5, 0.0], [1.5, 1.5, 0.0], [2.0, 0.0], [1.5, -0.1], [NAN, 0.0], [INF, 0.0], ["a", "b"],
            "abc", 3, [[1.5, 0.0]], [1.5, None], np.array([]), torch.empty(0), {"a": 1},
        )
    ),
    ({"num_inference_steps": 1001}, "`num_inference_steps`"),
    *(
        ({name: value}, f"`{name}` is ")
        for name in ("use_resolution_binning", "clean_caption", "return_dict")
        for value in ("false", 1, 0.0, [])
    ),
    *(({"output_type": value}, "`output_type` is ") for value in ("jpg", "PIL", None, 3)),
    *(
        ({"generator": value}, "`generator` is ")
        for value in (42, "42", [], [None], [torch.Generator()] * 2, (torch.Generator(),), [torch.Generator(), 3])
    ),
    *(
        ({"latents": value}, "`latents` ")
        for value in (
            torch.zeros(1, 4, 8, 4), torch.zeros(2, 4, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8),
            torch.zeros(1, 4, 8, 8, dtype=torch.long), torch.zeros(1, 4, 8, 8, dtype=torch.complex64),
            torch.full((1, 4, 8, 8), NAN), torch.full((1, 4, 8, 8), INF), np.zeros((1, 4, 8, 8)), [[0.0]], "noise",
        )
    ),
    ({"latents": NOISE, "height": 32}, "`latents` has the shape \\(1, 4, 8, 8\\), but .* \\(1, 4, 4, 8\\)"),
    ({"latents": NOISE, "num_images_per_prompt": 2}, "`latents` has the shape"),
    ({"latents": NOISE, "generator": [torch.Generator()] * 3}, "`generator` is a list of generators of length 3"),
    ({"latents": NOISE, "image": PICTURE}, "`latents` and `image` are both given"),
    *(
        (embeds(value), "`prompt_embeds` ")
        for value in (
            torch.ones(4, 16), torch.ones(1, 4, 8), torch.ones(0, 4, 16), torch.ones(1, 0, 16), np.ones((1, 4, 16)),
            torch.ones(1, 4, 16, dtype=torch.long), torch.full((1, 4, 16), NAN), torch.full((1, 4, 16), INF), "a dog",
        )
    ),
    *(
        (embeds(prompt_attention_mask=value), "`prompt_attention_mask` ")
        for value in (
            torch.ones(1, 5), torch.ones(2, 4), torch.ones(4), np.ones((1, 4)), torch.zeros(1, 4),
            torch.full((1, 4), 0.5), torch.full((1, 4), NAN), [[1, 1, 1, 1]],
        )
    ),
    ({"prompt_attention_mask": MASK}, "`prompt_attention_mask` is given without the `prompt_embeds`"),
    *(({"complex_human_instruction": value}, "`complex_human_instruction` is ") for value in ("Enhance: ", [1], 3)),
    *(({"attention_kwargs": value}, "`attention_kwargs` is ") for value in ("scale", [("scale", 1)], 0.5)),
    *(({"attention_kwargs": {"scale": value}}, "`attention_kwargs.*` is ") for value in (NAN, "0.5", [1], True)),
    *(({"callback_on_step_end": value}, "`callback_on_step_end` is ") for value in ("print", 3)),
    *(
        ({"callback_on_step_end_tensor_inputs": value}, "`callback_on_step_end_tensor_inputs` is ")
        for value in ("latents", None, [1])
    ),
    *((returning(value), "`callback_on_step_end` returned a ") for value in (torch.zeros(1), [], True, "latents")),
    *(
        (returning({"latents": value}), "`callback_on_step_end` returned 'latents'")
        for value in (None, torch.zeros(1, 4, 4, 4), [0.0], np.zeros((1, 4, 8, 8), np.float32))
    ),
    ({**returning({"latents": torch.zeros(1, 4, 2, 2)}), "callback_on_step_end_tensor_inputs": []},
     "`callback_on_step_end` returned 'latents', which it was not given"),
    *(
        ({"image": value}, "`image` ")
        for value in (
            [], [None], [PICTURE, None], Image.new("RGB", (0, 0)), np.zeros((0, 0, 3), np.float32),
            torch.zeros(1, 3, 0, 64), torch.full((1, 3, 64, 64), NAN),
        )
    ),
    *(({"image": PICTURE, "strength": value}, "`strength` is ") for value in (0, -1, 1.5, NAN, "0.5", None, True)),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
def test_a_bad_argument_is_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, **{"prompt": "a red fox", **arguments})


GOOD_CALLS = [
    ({"num_inference_steps": np.int64(1)}, {"num_inference_steps": 1}),
    ({"num_inference_steps": torch.tensor(1)}, {"num_inference_steps": 1}),
    ({"num_images_per_prompt": np.int32(2)}, {"num_images_per_prompt": 2}),
    ({"height": np.int64(32), "width": np.uint8(64)}, {"height": 32, "width": 64}),
    ({"max_sequence_length": np.int64(16)}, {"max_sequence_length": 16}),
    ({"guidance_scale": np.float32(4.0)}, {"guidance_scale": 4.0}),
    ({"guidance_scale": torch.tensor(5)}, {"guidance_scale": 5.0}),
    ({"timesteps": np.array([HALF_PI, 1.0, 0.0])}, {"num_inference_steps": 2}),
    ({"timesteps": (HALF_PI, 0.0), "num_inference_steps": np.int64(1)}, {"num_inference_steps": 1}),
    ({"max_timesteps": np.float32(1.5)}, {"max_timesteps": 1.5}),
    ({"use_resolution_binning": np.bool_(True), "height": 64}, {}),
    ({"prompt": np.str_("a red fox")}, {}),
    ({"callback_on_step_end": lambda *_: None}, {}),
    ({"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": []}, {}),
    ({"latents": NOISE.double(), "num_inference_steps": 1}, {"latents": NOISE, "num_inference_steps": 1}),
    ({"latents": NOISE.half(), "num_inference_steps": 1}, {"latents": NOISE, "num_inference_steps": 1}),
    (embeds(prompt_attention_mask=MASK.bool()), embeds(prompt_attention_mask=MASK.long())),
]


@pytest.mark.parametrize(("arguments", "plain"), GOOD_CALLS)
def test_a_number_of_another_library_is_the_number(pipeline, arguments, plain):
    pictures = [generate(pipeline, **{"prompt": "a red fox", **given}) for given in (arguments, plain)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("text_encoder", {}, "`prompt` is given, but `text_encoder` is None"),
        ("tokenizer", {}, "`prompt` is given, but `tokenizer` is None"),
        ("transformer", {}, "`transformer` is None"),
        ("scheduler", {}, "`scheduler` is None"),
        ("vae", {"output_type": "pil"}, "`vae` is None"),
    ],
)
def test_a_missing_component_is_named(pipeline, missing, arguments, message):
    without = SanaTBCMPipeline(**{**pipeline.components, missing: None})
    with pytest.raises(ValueError, match=message):
        generate(without, **arguments)
    if missing in ("text_encoder", "tokenizer"):
        with pytest.raises(ValueError, match=message):
            without.encode_prompt("a red fox")


@pytest.mark.parametrize("scheduler", [SCMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_a_sampler_of_another_kind_that_was_set_since_is_named(pipeline, scheduler):
    other = SanaTBCMPipeline(**pipeline.components)
    other.scheduler = scheduler
    with pytest.raises(ValueError, match=f"`scheduler` is a {type(scheduler).__name__}, which has been set since"):
        generate(other)


@pytest.mark.parametrize("scale", [0, -1.0, NAN, 1000.0])
def test_a_scale_of_time_that_no_student_has_is_named(scale):
    pipeline = tiny_tbcm_pipeline()
    pipeline.transformer.register_to_config(timestep_scale=scale)
    with pytest.raises(ValueError, match=r"`transformer\.config\.timestep_scale` is "):
        generate(pipeline)


def test_a_pipeline_is_made_of_pipelines_of_its_family_only(pipeline):
    for other in (None, "student", SanaPipelineOutput(images=[])):
        with pytest.raises(ValueError, match=f"`pipeline` is a {type(other).__name__}, which has no scheduler, "):
            SanaTBCMPipeline.from_pipe(other)


def test_latents_need_no_decoder(pipeline):
    without = SanaTBCMPipeline(**{**pipeline.components, "vae": None})
    without.set_progress_bar_config(disable=True)
    without.vae_scale_factor = pipeline.vae_scale_factor
    latents = generate(without, output_type="latent", height=64, width=64)
    assert torch.equal(latents, generate(pipeline, output_type="latent"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": "a dog", "max_sequence_length": 0}, "`max_sequence_length` is 0"),
        ({"prompt": "a dog", "num_images_per_prompt": -1}, "`num_images_per_prompt` is -1"),
        ({"prompt": None, "prompt_embeds": EMBEDS}, "Must provide `prompt_attention_mask`"),
    ],
)
def test_encoding_alone_is_checked_too(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.encode_prompt(**arguments)


@pytest.mark.parametrize("output_type", ["latent", "jpg", None])
def test_a_look_at_latents_is_a_picture(pipeline, output_type):
    with pytest.raises(ValueError, match="`output_type` is "):
        pipeline.decode_latents(NOISE, output_type)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sigma_data": NAN}, "`sigma_data` is nan"),
        ({"sigma_data": INF}, "`sigma_data` is inf"),
        ({"sigma_data": "0.5"}, "`sigma_data` is '0.5'"),
        ({"guidance_scales": [4.0, NAN]}, "`guidance_scales` is nan"),
        ({"guidance_scales": ["4"]}, "`guidance_scales` is '4'"),
        ({"timesteps_by_steps": {"1": ["a", 0]}}, r"`timesteps_by_steps\['1'\]` is"),
        ({"timesteps_by_steps": {"1": {"a": 1}}}, r"`timesteps_by_steps\['1'\]` is"),
        ({"timesteps_by_steps": [1.0, 0.0]}, r"`timesteps_by_steps` is \[1.0, 0.0\]"),
        ({"timesteps_by_steps": "2"}, "`timesteps_by_steps` is '2'"),
        ({"sigma_data": 1e300}, "`sigma_data` is 1e"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` is 0"),
        ({"num_train_timesteps": 1.5}, "`num_train_timesteps` is 1.5"),
        ({"guidance_scales": 4.5}, "`guidance_scales` is 4.5"),
        ({"guidance_scales": "4"}, "`guidance_scales` is 4"),
        ({"guidance_scales": {"4": 1}}, "`guidance_scales` is {"),
        ({"guidance_scales": [1e300]}, "`guidance_scales` is 1e"),
        ({"call_options": {"guidance_scale": NAN}}, r"`call_options\['guidance_scale'\]` is nan"),
        ({"call_options": {"guidance_scale": -3}}, r"`call_options\['guidance_scale'\]` is -3"),
        ({"call_options": {"guidance_scale": "4"}}, r"`call_options\['guidance_scale'\]` is '4'"),
        ({"call_options": {"height": 64.0}}, r"`call_options\['height'\]` is 64.0"),
        ({"call_options": {"width": -8}}, r"`call_options\['width'\]` is -8"),
        ({"call_options": {"max_sequence_length": None}}, r"`call_options\['max_sequence_length'\]` is None"),
        ({"call_options": {"complex_human_instruction": "abc"}}, "`complex_human_instruction` is 'abc'"),
    ],
)
def test_a_samplers_config_is_checked(config, message):
    with pytest.raises(ValueError, match=message):
        TBCMScheduler(**config)


def test_numbers():
    assert whole_number("n", np.int64(3)) == 3 and type(whole_number("n", np.int64(3))) is int
    assert real_number("w", np.float32(0.5)) == 0.5 and type(real_number("w", torch.tensor(2))) is float
    with pytest.raises(ValueError, match="`n` is 4, but has to be a whole number of at least 5"):
        whole_number("n", 4, minimum=5)
