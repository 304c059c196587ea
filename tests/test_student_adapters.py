"""A student's guidance embedder goes with its adapter: every verb, whichever way it is called."""

import shutil

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import SanaPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import generate, tiny_sana_pipeline, tiny_transformer

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.lora import make_lora_student, save_lora
from diffusers_tbcm.student_adapters import CALLS, GUIDANCE_EMBEDDER_FILE, SCALED, check_can_be_saved


SIZE = {"height": 64, "width": 64, "use_resolution_binning": False}
SAME = {"atol": 1e-5, "rtol": 0}  # adapters are added in another order
FUSED = {"atol": 1e-4, "rtol": 0}  # weights are summed before use


def draw(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return generate(pipeline, **arguments)


def quiet_teacher(**config):
    pipeline = tiny_sana_pipeline(**config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def on_teacher(**config):
    return SanaTBCMPipeline.from_pipe(quiet_teacher(**config))


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two students of the tiny teacher, and a style without a guidance embedder."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("a", "b")):
        student = make_lora_student(tiny_transformer(), rank=2)
        torch.manual_seed(seed)
        for weight in student.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1)
        save_lora(student, folder / name)
    style = tiny_transformer()
    style.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "time_embed.linear"]))
    SanaPipeline.save_lora_weights(folder / "style", transformer_lora_layers=get_peft_model_state_dict(style))
    return folder


@pytest.fixture(scope="module")
def alone(loras):
    """What each student draws that is loaded by itself."""

    def pictures(name):
        pipeline = on_teacher()
        pipeline.load_lora_weights(loras / name)
        return draw(pipeline)

    found = {name: pictures(name) for name in ("a", "b")}
    assert not torch.allclose(found["a"], found["b"], atol=1e-2)
    return found


@pytest.fixture
def both(loras):
    pipeline = on_teacher()
    for name in ("a", "b"):
        pipeline.load_lora_weights(loras / name, adapter_name=name)
    return pipeline


@pytest.fixture(scope="module")
def teachers_picture():
    return draw(quiet_teacher(), num_inference_steps=2, **SIZE)


def assert_is_the_teacher(pipeline, expected):
    """Ours refuses to draw with it, and a stock pipeline draws what the teacher draws."""
    with pytest.raises(ValueError, match=r"`transformer\.config\.guidance_embeds` is False"):
        draw(pipeline)
    stock = SanaPipeline(**{**quiet_teacher().components, "transformer": pipeline.transformer})
    assert torch.equal(draw(stock, num_inference_steps=2, **SIZE), expected)


def test_the_student_loaded_last_draws(both, alone):
    torch.testing.assert_close(draw(both), alone["b"], **SAME)


def test_set_adapters_goes_back_and_forth(both, alone):
    for name in ("a", "b", "a", "a", "b"):
        both.set_adapters(name)
        torch.testing.assert_close(draw(both), alone[name], **SAME)


def test_a_weight_is_the_embedders_too(both, alone, teachers_picture):
    both.set_adapters(["a", "b"], [0.0, 1.0])
    torch.testing.assert_close(draw(both), alone["b"], **SAME)
    embed = both.transformer.time_embed.guidance_embedder
    projected = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    full_b = embed(projected)
    both.set_adapters("a")
    full_a = both.transformer.time_embed.guidance_embedder(projected)
    both.set_adapters(["a", "b"], [0.25, 0.5])
    blended = both.transformer.time_embed.guidance_embedder(projected)
    torch.testing.assert_close(blended, 0.25 * full_a + 0.5 * full_b)
    both.set_adapters("a", 0.0)
    assert_is_the_teacher(both, teachers_picture)


@pytest.mark.parametrize("undo", ["unload_lora_weights", "disable_lora", "delete_adapters"])
def test_without_its_adapter_a_student_is_its_teacher(loras, alone, teachers_picture, undo):
    pipeline = on_teacher()
    pipeline.load_lora_weights(loras / "a", adapter_name="a")
    getattr(pipeline, undo)(*["a"] * (undo == "delete_adapters"))
    assert_is_the_teacher(pipeline, teachers_picture)
    if undo == "disable_lora":
        pipeline.enable_lora()
    else:
        pipeline.load_lora_weights(loras / "b", adapter_name="a")
    torch.testing.assert_close(draw(pipeline), alone["a" if undo == "disable_lora" else "b"], **SAME)


def test_what_is_done_to_the_transformer_itself_counts_too(both, alone):
    both.transformer.set_adapters("a")
    torch.testing.assert_close(draw(both), alone["a"], **SAME)
    both.transformer.disable_lora()
    with pytest.raises(ValueError, match="guidance_embeds` is False"):
        draw(both)
    both.transformer.enable_lora()
    both.transformer.delete_adapters("a")
    torch.testing.assert_close(draw(both), alone["b"], **SAME)
    both.transformer.unload_lora()
    with pytest.raises(ValueError, match="guidance_embeds` is False"):
        draw(both)


def test_the_adapter_that_is_left_draws(both, alone):
    both.delete_adapters("b")
    torch.testing.assert_close(draw(both), alone["a"], **SAME)


def test_another_student_takes_a_students_place(loras, alone):
    pipeline = on_teacher()
    pipeline.load_lora_weights(loras / "a", adapter_name="x")
    transformer = pipeline.transformer
    pipeline.load_lora_weights(loras / "b", adapter_name="x", hotswap=True)
    assert pipeline.transformer is transformer
    torch.testing.assert_close(draw(pipeline), alone["b"], **SAME)


def test_loading_that_fails_changes_nothing(loras, alone):
    pipeline = on_teacher()
    teacher = pipeline.transformer
    with pytest.raises(ValueError, match="Trying to hotswap"):
        pipeline.load_lora_weights(loras / "a", adapter_name="x", hotswap=True)
    assert pipeline.transformer is teacher and not teacher.config.guidance_embeds
    pipeline.load_lora_weights(loras / "a", adapter_name="x")
    with pytest.raises(ValueError, match="already in use"):
        pipeline.load_lora_weights(loras / "b", adapter_name="x")
    torch.testing.assert_close(draw(pipeline), alone["a"], **SAME)


def test_a_fused_student_stays_when_its_layers_go_and_its_teacher_stays_too(loras, alone, teachers_picture, tmp_path):
    teacher = quiet_teacher()
    pipeline = SanaTBCMPipeline.from_pipe(teacher)
    pipeline.load_lora_weights(loras / "a", adapter_name="a")
    pipeline.fuse_lora()
    torch.testing.assert_close(draw(pipeline), alone["a"], **FUSED)
    for verb in (
        pipeline.disable_lora,
        lambda: pipeline.delete_adapters("a"),
        lambda: pipeline.set_adapters("a", 0.5),
    ):
        with pytest.raises(ValueError, match="call `unfuse_lora\\(\\)` first"):
            verb()
    pipeline.unfuse_lora()
    torch.testing.assert_close(draw(pipeline), alone["a"], **FUSED)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), alone["a"], **FUSED)
    assert torch.equal(draw(teacher, num_inference_steps=2, **SIZE), teachers_picture)
    pipeline.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(SanaTBCMPipeline.from_pretrained(tmp_path)), alone["a"], **FUSED)
    pipeline.load_lora_weights(loras / "style")  # it is a plain student now
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), alone["a"], **FUSED)


def test_one_of_two_students_is_fused(both, alone):
    both.fuse_lora(adapter_names=["a"])  # b is the active one
    torch.testing.assert_close(draw(both), alone["a"], **FUSED)
    both.unfuse_lora()
    torch.testing.assert_close(draw(both), alone["b"], **FUSED)


def test_a_style_beside_a_student(loras, alone, teachers_picture):
    pipeline = on_teacher()
    pipeline.load_lora_weights(loras / "a", adapter_name="a")
    pipeline.load_lora_weights(loras / "style", adapter_name="style")
    pipeline.set_adapters(["a", "style"])
    assert not torch.allclose(draw(pipeline), alone["a"], atol=1e-3)
    pipeline.set_adapters("style")
    with pytest.raises(ValueError, match="guidance_embeds` is False"):
        draw(pipeline)
    stock, transformer = quiet_teacher(), pipeline.transformer
    stock.load_lora_weights(loras / "style")
    expected = draw(stock, num_inference_steps=2, **SIZE)
    assert not torch.allclose(expected, teachers_picture, atol=1e-3)
    stock = SanaPipeline(**{**quiet_teacher().components, "transformer": transformer})
    torch.testing.assert_close(draw(stock, num_inference_steps=2, **SIZE), expected, **SAME)
    pipeline.set_adapters("a")
    torch.testing.assert_close(draw(pipeline), alone["a"], **SAME)


def test_a_teacher_with_a_guidance_embedder_gets_its_own_back(tmp_path):
    teacher = tiny_transformer(guidance_embeds=True)
    before = draw(on_teacher(guidance_embeds=True))
    student = make_lora_student(teacher, rank=2)
    torch.manual_seed(0)
    for weight in student.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    save_lora(student, tmp_path)
    expected = draw(SanaTBCMPipeline(**{**on_teacher().components, "transformer": student}))
    pipeline = on_teacher(guidance_embeds=True)
    pipeline.load_lora_weights(tmp_path, adapter_name="a")
    torch.testing.assert_close(draw(pipeline), expected, **SAME)
    pipeline.set_adapters("a", 0.0)
    torch.testing.assert_close(draw(pipeline), before, **SAME)
    pipeline.set_adapters("a", 1.0)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), before)


def test_the_scale_of_a_call_is_the_embedders_too_and_ends_with_the_call(loras, alone):
    pipeline = on_teacher()
    pipeline.load_lora_weights(loras / "a", adapter_name="a")
    pipeline.set_adapters("a", 0.5)
    expected = draw(pipeline)
    pipeline.set_adapters("a")
    torch.testing.assert_close(draw(pipeline, attention_kwargs={"scale": 0.5}), expected, **SAME)
    torch.testing.assert_close(draw(pipeline), alone["a"], **SAME)
    with pytest.raises(ValueError, match="guidance_embeds` is False"):
        draw(pipeline, attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(draw(pipeline), alone["a"], **SAME)
    assert not SCALED and not any(CALLS.values())


def test_a_scale_is_refused_while_another_call_draws(loras):
    pipeline = on_teacher()
    pipeline.load_lora_weights(loras / "a")

    def draw_within(pipe, step, timestep, tensors):
        with pytest.raises(ValueError, match="another call is under way"):
            draw(pipeline, attention_kwargs={"scale": 0.5})

    draw(pipeline, callback_on_step_end=draw_within)


def test_pipelines_that_share_a_network_share_its_students(both, alone):
    other = SanaTBCMPipeline.from_pipe(both)
    other.set_adapters("a")
    torch.testing.assert_close(draw(both), alone["a"], **SAME)
    other.unload_lora_weights()
    with pytest.raises(ValueError, match="guidance_embeds` is False"):
        draw(both)


def test_what_a_folder_cannot_hold_is_not_saved(both, tmp_path):
    with pytest.raises(ValueError, match="LoRA adapters beside its weights"):
        both.save_pretrained(tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()
    both.set_adapters(["a", "b"], [0.5, 0.5])
    both.fuse_lora()
    both.unload_lora_weights()
    with pytest.raises(ValueError, match="guidance embedders of several students"):
        check_can_be_saved(both.transformer)


def test_students_of_different_configs_do_not_draw_together(loras, tmp_path):
    student = make_lora_student(tiny_transformer(), rank=2)
    student.register_to_config(guidance_embeds_scale=0.3)
    save_lora(student, tmp_path)
    pipeline = on_teacher()
    pipeline.load_lora_weights(loras / "a", adapter_name="a")
    pipeline.load_lora_weights(tmp_path, adapter_name="b")
    assert pipeline.transformer.config.guidance_embeds_scale == 0.3
    with pytest.raises(ValueError, match="cannot draw together: a, b"):
        pipeline.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="cannot draw together: a, b"):
        draw(pipeline)
    pipeline.set_adapters("a")
    assert pipeline.transformer.config.guidance_embeds_scale == 0.1 and draw(pipeline).isfinite().all()


def test_another_networks_embedder_is_named(tmp_path):
    save_lora(make_lora_student(tiny_transformer(num_attention_heads=4), rank=2), tmp_path)
    pipeline = on_teacher()
    with pytest.raises(ValueError, match="does not fit `transformer`"):
        pipeline.load_lora_weights(tmp_path)
    assert not pipeline.transformer.config.guidance_embeds


def test_adapters_are_not_switched_under_offloading_by_layers(both):
    add_hook_to_module(both.transformer.time_embed.linear, ModelHook())
    with pytest.raises(ValueError, match="hooks on its layers"):
        both.set_adapters("a")


def test_a_moved_network_keeps_its_precision_when_it_changes(both):
    both.to(torch.bfloat16)
    for name in ("a", "b"):
        both.set_adapters(name)
        assert {weight.dtype for weight in both.transformer.parameters()} == {torch.bfloat16}
        assert np.isfinite(draw(both).float().numpy()).all()


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_student_of_another_teacher_is_named(loras, num_layers):
    pipeline = on_teacher(num_layers=num_layers)
    before = pipeline.transformer
    with pytest.raises(ValueError, match=r"a student of another network, as transformer_blocks\.\d\."):
        pipeline.load_lora_weights(loras / "a")
    assert pipeline.transformer is before and not hasattr(before, "peft_config")


def test_a_second_student_is_compared_with_the_layers_below_the_first(both, loras, alone):
    both.load_lora_weights(loras / "a", adapter_name="again")
    torch.testing.assert_close(draw(both), alone["a"], **SAME)


def damaged(lora, folder, *, tensors=(), header=None, cut=None):
    """A copy of a student whose guidance embedder has other tensors or another header, or ends early."""
    shutil.copytree(lora, folder)
    file = folder / GUIDANCE_EMBEDDER_FILE
    metadata = {"format": "pt"} if header is None else {"format": "pt", LORA_ADAPTER_METADATA_KEY: header}
    save_file({**load_file(file), **dict(tensors)}, file, metadata)
    if cut is not None:
        file.write_bytes(file.read_bytes()[:cut])
    return folder


@pytest.mark.parametrize(
    "tensors",
    [
        {"guidance_embeds_scale": torch.tensor(float("nan"))},
        {"guidance_embeds_scale": torch.tensor(0.0)},
        {"timestep_scale": torch.tensor(-1.0)},
        {"timestep_scale": torch.ones(2)},
        {"linear_1.weight": torch.ones(3, 7)},
        {"linear_1.weight": torch.tensor(1.0)},
        {"linear_1.bias": torch.ones(1)},
        {"linear_2.weight": torch.ones(2, 2)},
        {"linear_2.bias": torch.tensor(1.0)},
        {"linear_2.bias": torch.ones(16, dtype=torch.int64)},
    ],
)
def test_an_embedder_that_does_not_fit_is_named_and_changes_nothing(loras, tensors, tmp_path):
    pipeline = on_teacher()
    before = pipeline.transformer
    with pytest.raises(ValueError, match="does not fit `transformer`"):
        pipeline.load_lora_weights(damaged(loras / "a", tmp_path / "lora", tensors=tensors))
    assert pipeline.transformer is before


@pytest.mark.parametrize("cut", [0, 50, 1000])
def test_a_torn_embedder_is_named(loras, cut, tmp_path):
    with pytest.raises(ValueError, match=f"{GUIDANCE_EMBEDDER_FILE} of the LoRA is torn"):
        on_teacher().load_lora_weights(damaged(loras / "a", tmp_path / "lora", cut=cut))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "holds \\[\\], and no dict"),
        ("3", "holds 3, and no dict"),
        ("{", "is torn"),
        ('{"guidance_scales": []}', "`guidance_scales` is "),
        ('{"guidance_scales": 4}', "`guidance_scales` is 4"),
        ('{"guidance_scales": [-1]}', "`guidance_scales` is "),
        ('{"guidance_scales": [NaN]}', "`guidance_scales` is nan"),
        ('{"call_options": "x"}', "`call_options` is x"),
        ('{"call_options": {"callback_on_step_end": "os.system"}}', "`call_options` is "),
        ('{"call_options": {"max_sequence_length": "300"}}', "`call_options\\['max_sequence_length'\\]` is '300'"),
    ],
)
def test_what_a_lora_says_of_its_training_is_checked(loras, header, message, tmp_path):
    pipeline = on_teacher()
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(damaged(loras / "a", tmp_path / "lora", header=header))
    assert not pipeline.transformer.config.guidance_embeds


@pytest.mark.parametrize(
    "header", [None, "null", "{}", '{"timesteps_by_steps": {"2": [9, 0]}, "auto_map": {"a": "b"}}']
)
def test_nothing_else_in_its_header_counts(loras, alone, header, tmp_path):
    pipeline = on_teacher()
    pipeline.load_lora_weights(damaged(loras / "a", tmp_path / "lora", header=header))
    torch.testing.assert_close(draw(pipeline), alone["a"], **SAME)


@pytest.mark.parametrize("name", ["v1.5", ""])
def test_a_name_that_no_layer_can_have_is_refused(loras, name):
    with pytest.raises(ValueError, match=f"`adapter_name` is '{name}'"):
        on_teacher().load_lora_weights(loras / "a", adapter_name=name)
