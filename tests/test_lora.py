import json
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from huggingface_hub import ModelCard
from packaging.version import Version
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import LATENT_CHANNELS, TEXT_HIDDEN_SIZE, tiny_sana_pipeline, tiny_transformer, write_tiny_pipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.export.folders import save_flow_lora, save_student_lora, save_student_pipeline
from diffusers_tbcm.export.record import StudentDescription
from diffusers_tbcm.lora import (
    LORA_FILE,
    adapt,
    copy_trained,
    drop_frozen_weights,
    make_lora_student,
    merge_lora,
    save_adapters,
    save_lora,
)
from diffusers_tbcm.loss import LogvarHead, StudentWithLogvar
from diffusers_tbcm.owned import MARKER
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler
from diffusers_tbcm.tangent import consistency_tangent
from diffusers_tbcm.text import Text
from diffusers_tbcm.trigflow import TrigFlowTransformer, trig_to_flow_timestep


NEEDS_LORA_BIAS = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.40"), reason="this diffusers loads adapters without their bias"
)
RANK, ALPHA = 4, 6
PROMPT = "a small dolphin"
SIZES = {"height": 64, "width": 64, "use_resolution_binning": False}  # what the stock pipeline needs to be told
DENSE = {"timestep_scale": 0.001}  # SanaPipeline multiplies it by 1000 s


def network_inputs():
    """sample, timestep, prompt embeddings, their mask and guidance for the tiny transformer."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, LATENT_CHANNELS, 8, 8, generator=generator)
    embeds = torch.randn(3, 6, TEXT_HIDDEN_SIZE, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]]).repeat(3, 1)
    return sample, torch.tensor([0.2, 0.8, 1.4]), embeds, mask, torch.tensor([4.0, 4.5, 5.0])


def output(transformer):
    """F, under autocast where the weights are in lower precision."""
    *inputs, guidance = network_inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=transformer.dtype == torch.bfloat16):
        return TrigFlowTransformer(transformer)(*inputs, guidance if transformer.config.guidance_embeds else None)


def trained(transformer):
    """By name."""
    return {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}


def copied_state(transformer):
    return {name: weight.clone() for name, weight in transformer.state_dict().items()}


def disturb(student):
    """Move everything that trains away from its start, where the adapters and the guidance embedder give zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trained(student).values():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return student


@pytest.fixture
def teacher():
    return tiny_transformer()


@pytest.fixture
def student(teacher):
    torch.manual_seed(0)
    return make_lora_student(teacher, rank=RANK, alpha=ALPHA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_student_starts_equal_to_the_teacher_and_shares_its_weights(dtype, guidance_embeds):
    teacher = tiny_transformer(guidance_embeds=guidance_embeds).to(dtype)
    expected = output(teacher)
    student = make_lora_student(teacher, rank=RANK)
    assert torch.equal(output(student), expected)
    disturb(student)
    assert not torch.allclose(output(student), expected, rtol=0.1)
    assert torch.equal(output(teacher), expected)

    theirs = {id(weight) for name, weight in teacher.named_parameters() if "guidance_embedder" not in name}
    ours = {id(weight) for weight in student.parameters() if not weight.requires_grad}
    assert theirs == ours
    assert all(weight.dtype == torch.float32 for weight in trained(student).values())
    assert student.config.guidance_embeds and teacher.config.guidance_embeds == guidance_embeds
    assert not any("lora" in name for name, _ in teacher.named_modules())


def test_casting_the_teacher_keeps_one_copy_and_leaves_what_trains_in_float32(teacher, student):
    teacher.to(torch.bfloat16)
    pointers = {weight.data_ptr() for weight in student.parameters()}
    assert all(weight.data_ptr() in pointers for weight in teacher.parameters())
    assert all(weight.dtype == torch.float32 for weight in trained(student).values())


def test_an_optimiser_step_changes_adapters_and_guidance_embedder_only(teacher, student):
    disturb(student)
    teacher_before, student_before, drawn_before = copied_state(teacher), copied_state(student), output(teacher)
    optimizer = torch.optim.SGD(trained(student).values(), lr=1.0)
    gradients = []
    for checkpointing in (student.disable_gradient_checkpointing, student.enable_gradient_checkpointing):
        checkpointing()
        optimizer.zero_grad()
        output(student).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None})
    optimizer.step()

    changed = {name for name, weight in student.state_dict().items() if not torch.equal(weight, student_before[name])}
    assert changed == {name for name in student_before if ".lora_" in name or ".guidance_embedder." in name}
    assert gradients[0].keys() == gradients[1].keys() == changed
    for name in changed:  # the same operations recomputed
        torch.testing.assert_close(gradients[0][name], gradients[1][name])
    assert all(torch.equal(weight, teacher_before[name]) for name, weight in teacher.state_dict().items())
    assert torch.equal(output(teacher), drawn_before)


def test_number_of_trained_parameters(student):
    inner, hidden, blocks = 16, 40, 2
    attention = 2 * 4 * (inner + inner)
    mix_ffn = (inner + 2 * hidden) + (hidden + inner)
    adapters = RANK * (blocks * (attention + mix_ffn) + (inner + 6 * inner))
    guidance_embedder = 256 * inner + inner + inner * inner + inner
    assert sum(weight.numel() for weight in trained(student).values()) == adapters + guidance_embedder


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-4),  # rounding, as W x + B (A x) is not (W + B A) x
        (torch.bfloat16, 0.05),  # bfloat16 has 8 bits, the network a dozen layers; the tangents' norm is about 1
    ],
)
def test_tangent_is_that_of_the_merged_student(dtype, tolerance):
    student = make_lora_student(tiny_transformer().to(dtype), rank=RANK, alpha=ALPHA)
    sample, t, embeds, mask, guidance = network_inputs()
    velocity = torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))

    def tangent(transformer):
        with torch.autocast("cpu", torch.bfloat16, enabled=transformer.dtype == torch.bfloat16):
            return consistency_tangent(
                TrigFlowTransformer(transformer), sample, velocity, t, Text(embeds, mask), guidance, ratio=1.0
            ).tangent.flatten(1)

    start, ours = tangent(student), tangent(disturb(student))
    merged = tangent(merge_lora(student))
    assert ((ours - merged).norm(dim=1) < tolerance).all()
    assert ((start - merged).norm(dim=1) > 2 * tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_student_is_plain_float32_and_leaves_student_and_teacher_alone(dtype, tmp_path):
    teacher = tiny_transformer().to(dtype)
    student = disturb(make_lora_student(teacher, rank=RANK, alpha=ALPHA))
    before = copied_state(student)
    merged = merge_lora(student)
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())
    assert before.keys() == student.state_dict().keys()

    name = "transformer_blocks.1.ff.conv_point"
    down, up = (before[f"{name}.lora_{side}.default.weight"].flatten(1) for side in "AB")
    expected = before[f"{name}.base_layer.weight"].float().flatten(1) + ALPHA / RANK * up @ down
    torch.testing.assert_close(merged.state_dict()[f"{name}.weight"].flatten(1), expected)
    assert all(weight.dtype == torch.float32 for weight in merged.parameters())

    merged.save_pretrained(tmp_path)
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == tiny_transformer(guidance_embeds=True).state_dict().keys()
    assert torch.equal(output(loaded), output(merged))
    with torch.no_grad():
        for weight in merged.parameters():
            weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())


def draw(pipeline, steps=2, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipeline(PROMPT, num_inference_steps=steps, generator=generator, output_type="np", **arguments).images


def test_loaded_adapters_draw_what_the_merged_export_draws_and_the_teacher_stays(tmp_path):
    teacher_pipeline = tiny_sana_pipeline()
    teacher_before = draw(teacher_pipeline, **SIZES)
    student = disturb(make_lora_student(tiny_transformer(), rank=RANK, alpha=ALPHA))
    student.register_to_config(guidance_embeds_scale=0.3, timestep_scale=0.001)
    folder = save_lora(student, tmp_path / "lora")
    export = save_student_pipeline(
        merge_lora(student),
        write_tiny_pipeline(tmp_path / "teacher"),
        tmp_path / "merged",
        StudentDescription(PROMPT, {}),
    )
    merged_pipeline = SanaTBCMPipeline.from_pretrained(export)
    expected = {scale: draw(merged_pipeline, guidance_scale=scale) for scale in (4.5, 40.0)}
    assert np.abs(expected[4.5] - expected[40.0]).max() > 1e-2

    for source in (folder, str(folder / LORA_FILE)):
        pipeline = SanaTBCMPipeline.from_pipe(teacher_pipeline, scheduler=TBCMScheduler())
        pipeline.load_lora_weights(source)
        for scale, images in expected.items():
            # float32 rounding of adapters apart and merged, through two steps and the autoencoder; images in [0, 1]
            np.testing.assert_allclose(draw(pipeline, guidance_scale=scale), images, rtol=0, atol=1e-4)
        assert pipeline.transformer.config.timestep_scale == 0.001
        assert pipeline.transformer.config.guidance_embeds_scale == 0.3
        pointers = {weight.data_ptr() for weight in pipeline.transformer.parameters()}
        assert all(weight.data_ptr() in pointers for weight in teacher_pipeline.transformer.parameters())

    pipeline.load_lora_weights(folder, adapter_name="again")  # over a transformer that has a guidance embedder
    pipeline.set_adapters("again")
    np.testing.assert_allclose(draw(pipeline), expected[4.5], rtol=0, atol=1e-4)

    np.testing.assert_array_equal(draw(teacher_pipeline, **SIZES), teacher_before)


@NEEDS_LORA_BIAS
def test_the_stock_pipeline_of_the_teacher_draws_the_students_pictures(tmp_path, caplog):
    guidance_scale = 40.0  # far from the default
    student = disturb(make_lora_student(tiny_transformer(**DENSE), rank=RANK, alpha=ALPHA))
    folder = save_lora(student, tmp_path, guidance_scale)
    ours = SanaTBCMPipeline.from_pipe(tiny_sana_pipeline(**DENSE), scheduler=TBCMScheduler())
    ours.load_lora_weights(folder)
    stock = tiny_sana_pipeline(**DENSE)
    stock.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    teacher = {steps: draw(stock, steps, guidance_scale=1.0, **SIZES) for steps in (1, 4)}
    stock.load_lora_weights(folder)
    assert not [message for message in caplog.messages if "keys" in message]  # unexpected or missing ones
    for steps in (1, 2, 4):
        expected = draw(ours, steps, guidance_scale=guidance_scale)
        sigmas = trig_to_flow_timestep(ours.scheduler.timesteps[:-1]).tolist()
        images = draw(stock, steps, guidance_scale=1.0, sigmas=sigmas, **SIZES)
        # float32 rounding of the TrigFlow maps, which the stock pipeline goes without; images in [0, 1]
        np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)
    for steps, images in teacher.items():
        assert np.abs(draw(ours, steps, guidance_scale=guidance_scale) - images).max() > 1e-2
    assert np.abs(draw(ours, guidance_scale=4.5) - draw(ours, guidance_scale=guidance_scale)).max() > 1e-2


def test_adapters_load_with_their_scale_and_ours_merge_without_the_stock_pipelines_bias(student, tmp_path):
    folder = save_lora(disturb(student), tmp_path)
    saved = get_peft_model_state_dict(student)
    stock, ours = tiny_sana_pipeline(), SanaTBCMPipeline.from_pipe(tiny_sana_pipeline(), scheduler=TBCMScheduler())
    for pipeline in (stock, ours):
        pipeline.load_lora_weights(folder)
        assert pipeline.transformer.time_embed.linear.scaling == {"default_0": ALPHA / RANK}
    loaded = get_peft_model_state_dict(ours.transformer, adapter_name="default_0")
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    expected = draw(ours)
    ours.fuse_lora()
    np.testing.assert_allclose(draw(ours), expected, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="lora_bias=True"):  # as the card says
        stock.fuse_lora()


# Runs the card's example for stock diffusers, then draws with its arguments and a fixed seed.
PLAIN_DIFFUSERS = """
import re, sys
sys.modules["diffusers_tbcm"] = None  # importing it is an error
import numpy as np, torch

card = open("run/lora/README.md", encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
assert image.size == (64, 64), image.size
all_sigmas = [eval(sigmas) for sigmas in re.findall(r"sigmas=(\\[.*?\\])", card)]
pictures = {
    str(len(sigmas)): pipe(
        prompt, sigmas=sigmas, generator=torch.Generator().manual_seed(3), output_type="np", **options
    ).images
    for sigmas in all_sigmas
}
np.savez("pictures.npz", **pictures)
"""


@NEEDS_LORA_BIAS
def test_plain_diffusers_runs_the_lora_cards_example_and_draws_what_ours_draws(tmp_path, monkeypatch):
    tiny_sana_pipeline(**DENSE).save_pretrained(tmp_path / "teacher")
    student = disturb(make_lora_student(tiny_transformer(**DENSE), rank=RANK, alpha=ALPHA))
    student.register_to_config(timestep_scale=1.0)  # as the training script names the same time
    folder = save_student_lora(
        student,
        tmp_path / "teacher",
        tmp_path / "run" / "lora",
        StudentDescription(PROMPT, {"steps": 7}, config={"flags": {"seed": 0}}, model_id="run/lora"),
        guidance_scale=5.0,
    )
    assert {path.name for path in folder.iterdir()} == {
        LORA_FILE, "guidance_embedder.safetensors", "README.md", "training.json", "training_config.json", MARKER,
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS], cwd=tmp_path, check=True, timeout=600)

    card = ModelCard.load(folder / "README.md")
    ours = {}
    monkeypatch.chdir(tmp_path)
    exec(card.text.split("```python")[2].split("```")[0], ours)
    assert type(ours["pipe"]) is SanaTBCMPipeline and ours["image"].size == (64, 64)
    with np.load("pictures.npz") as theirs:
        assert theirs.files == ["1", "2", "4"]
        for steps in (1, 2, 4):
            expected = draw(ours["pipe"], steps, guidance_scale=5.0)
            np.testing.assert_allclose(theirs[str(steps)], expected, rtol=0, atol=1e-3)  # the card's 4 digits of sigma


def test_a_lora_folder_brings_what_its_student_was_distilled_with(tmp_path):
    teacher = tiny_sana_pipeline(**DENSE)
    teacher.save_pretrained(tmp_path / "teacher")
    reading = {"max_sequence_length": 8, "complex_human_instruction": None}
    folder = save_student_lora(
        disturb(make_lora_student(teacher.transformer, rank=RANK)),
        tmp_path / "teacher",
        tmp_path / "lora",
        StudentDescription(PROMPT, {}),
        scheduler=TBCMScheduler(guidance_scales=[1.5, 2.0, 2.5], call_options=reading),
    )
    pipeline = SanaTBCMPipeline.from_pipe(SanaPipeline.from_pretrained(tmp_path / "teacher"))
    pipeline.load_lora_weights(folder)
    trained = {"guidance_scale": 2.0, **reading}
    assert pipeline.default_call_options == trained
    assert SanaTBCMPipeline.from_pipe(pipeline).default_call_options == trained
    pipeline.disable_lora()
    assert pipeline.default_call_options["max_sequence_length"] == 300
    pipeline.enable_lora()
    assert pipeline.default_call_options == trained
    save_lora(disturb(make_lora_student(teacher.transformer, rank=RANK)), tmp_path / "other")  # carries no record
    pipeline.load_lora_weights(tmp_path / "other", adapter_name="other")
    pipeline.set_adapters("other")
    assert pipeline.default_call_options["max_sequence_length"] == 300
    pipeline.set_adapters("default_0")
    assert pipeline.default_call_options == trained
    pipeline.delete_adapters("other")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    assert SanaTBCMPipeline.from_pretrained(tmp_path / "fused").default_call_options == trained
    assert json.loads((folder / "training.json").read_text())["adapter"]["guidance_scale"] == 2.0
    stock_example = (folder / "README.md").read_text().split("```python")[1]
    assert 'options["max_sequence_length"] = 8\noptions["complex_human_instruction"] = None\n' in stock_example
    assert "guidance_scale=1.0" in stock_example and 'options["guidance_scale"]' not in stock_example


@pytest.mark.parametrize(
    ("config", "stock"),
    [
        ({"timestep_scale": 0.001}, True),
        ({"timestep_scale": 1.0}, False),  # SanaPipeline would feed 1000 s to a network trained on s
        ({"timestep_scale": 0.001, "guidance_embeds": True}, False),  # SanaPipeline gives it no guidance
    ],
)
def test_a_lora_card_shows_the_stock_pipeline_only_where_that_draws(config, stock, tmp_path):
    tiny_sana_pipeline(**config).save_pretrained(tmp_path / "teacher")
    student = make_lora_student(tiny_transformer(**config), rank=RANK)
    folder = save_student_lora(student, tmp_path / "teacher", tmp_path / "lora", StudentDescription(PROMPT, {}))
    record = json.loads((folder / "training.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert record["adapter"]["stock_pipeline"] == ("sigmas=" in card.text) == stock
    assert any(name.endswith("lora_B.bias") for name in load_file(folder / LORA_FILE)) == stock
    assert "lora" in card.data.tags and "SanaTBCMPipeline" in card.text


def test_a_file_with_the_guidance_embedder_in_it_is_none_for_diffusers(student):
    layers = {f"transformer.{name}": weight for name, weight in get_peft_model_state_dict(student).items()}
    layers["transformer.time_embed.guidance_embedder.linear_1.bias"] = torch.zeros(16)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        tiny_sana_pipeline().load_lora_weights(layers)


def test_adapters_without_a_guidance_embedder_load_as_ever(student, tmp_path):
    save_lora(disturb(student), tmp_path / "both")
    (tmp_path / "style").mkdir()
    shutil.copy(tmp_path / "both" / LORA_FILE, tmp_path / "style")
    pipeline = tiny_sana_pipeline(guidance_embeds=True)
    pipeline = SanaTBCMPipeline(**{**pipeline.components, "scheduler": TBCMScheduler()})
    transformer, before = pipeline.transformer, draw(pipeline)
    pipeline.load_lora_weights(tmp_path / "style")
    assert pipeline.transformer is transformer
    assert np.abs(draw(pipeline) - before).max() > 1e-2
    pipeline.unload_lora_weights()
    np.testing.assert_array_equal(draw(pipeline), before)


def test_loading_a_guidance_embedder_into_an_offloaded_pipeline_is_refused(student, tmp_path):
    folder = save_lora(student, tmp_path)
    pipeline = SanaTBCMPipeline.from_pipe(tiny_sana_pipeline(), scheduler=TBCMScheduler())
    add_hook_to_module(pipeline.transformer, ModelHook())
    with pytest.raises(ValueError, match="load the LoRA first"):
        pipeline.load_lora_weights(folder)


def test_checkpoint_holds_what_trains_and_brings_it_back(student, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(StudentWithLogvar(TrigFlowTransformer(student), LogvarHead(16)))
    accelerator.register_save_state_pre_hook(drop_frozen_weights)
    saved = copied_state(disturb(model))
    accelerator.save_state(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == trained(model).keys()
    disturb(model)
    accelerator.load_state(tmp_path, strict=False)
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_adapted_networks_share_the_base_and_nothing_that_trains(dtype):
    teacher = tiny_transformer().to(dtype)
    expected = output(teacher)
    first = adapt(teacher, rank=RANK, alpha=ALPHA)
    second = copy_trained(first)
    assert torch.equal(output(first), expected) and torch.equal(output(second), expected)
    weights = dict(teacher.named_parameters())
    for network in (first, second):
        frozen = {name.replace(".base_layer", ""): w for name, w in network.named_parameters() if not w.requires_grad}
        assert frozen.keys() == weights.keys() and all(frozen[name] is weights[name] for name in weights)
        assert all(".lora_" in name and weight.dtype == torch.float32 for name, weight in trained(network).items())
    assert all(torch.equal(trained(second)[name], weight) for name, weight in trained(first).items())
    assert not {id(weight) for weight in trained(first).values()} & {id(weight) for weight in trained(second).values()}
    disturb(first)
    assert not torch.allclose(output(first), expected, rtol=0.1)
    assert torch.equal(output(second), expected) and torch.equal(output(teacher), expected)
    assert not first.config.guidance_embeds and not any("lora" in name for name, _ in teacher.named_modules())


def test_a_copy_of_what_trains_in_full_shares_nothing(teacher):
    copied = copy_trained(teacher)
    assert not {weight.data_ptr() for weight in copied.parameters()} & {w.data_ptr() for w in teacher.parameters()}
    assert torch.equal(output(copied), output(teacher))


def test_merged_adapters_are_a_plain_network_and_saved_ones_have_no_bias(teacher, tmp_path):
    student = disturb(adapt(teacher, rank=RANK, alpha=ALPHA))
    merged = merge_lora(student)
    # float32 rounding, as W x + B (A x) is not (W + B A) x, through a dozen layers of outputs of size 1
    torch.testing.assert_close(output(merged), output(student), rtol=0, atol=1e-4)
    assert merged.state_dict().keys() == tiny_transformer().state_dict().keys()
    layers, metadata = SanaPipeline.lora_state_dict(save_adapters(student, tmp_path), return_lora_metadata=True)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    assert not any(name.endswith(".bias") for name in layers) and "transformer.lora_bias" not in metadata
    assert metadata["transformer.r"] == RANK and metadata["transformer.lora_alpha"] == ALPHA


def test_a_flow_lora_takes_the_place_of_a_consistency_students_and_leaves_no_embedder(tmp_path):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    where = (teacher, tmp_path / "lora", StudentDescription(PROMPT, {}))
    save_student_lora(make_lora_student(tiny_transformer(), rank=RANK), *where)
    assert (tmp_path / "lora" / "guidance_embedder.safetensors").exists()
    folder = save_flow_lora(adapt(tiny_transformer(), rank=RANK), *where, scheduler=FlowStudentScheduler(3.0))
    assert {path.name for path in folder.iterdir()} == {LORA_FILE, "README.md", "training.json", MARKER}
    card = ModelCard.load(folder / "README.md")
    assert {"lora", "cdm"} <= {*card.data.tags} and "tbcm" not in card.data.tags
    assert "FlowMatchEulerDiscreteScheduler(shift=3.0)" in card.text and "register_to_config" not in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 4, "alpha": -1}, "`alpha` is -1"),
        ({"rank": 4, "target_modules": ["to_q", "to_z"]}, "'to_z', but no linear or convolution layer"),
        ({"rank": 4, "target_modules": ["attn1"]}, "'attn1', but no linear or convolution layer"),
    ],
)
def test_arguments_that_no_network_can_be_adapted_by_are_named(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        adapt(teacher, **arguments)
    assert all(weight.requires_grad for weight in teacher.parameters())  # untouched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 4, "alpha": -1}, "`alpha` is -1"),
        ({"rank": 4, "target_modules": ["to_q", "to_z"]}, "'to_z', but no linear or convolution layer"),
        ({"rank": 4, "target_modules": ["attn1"]}, "'attn1', but no linear or convolution layer"),
        ({"rank": 4, "target_modules": ["linear_1"]}, "'linear_1', which takes in the guidance embedder"),
        ({"rank": 4, "target_modules": ["timestep_embedder.linear_1"]}, "has that layer under another name"),
    ],
)
def test_arguments_that_cannot_be_are_named(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_lora_student(teacher, **arguments)
    assert all(weight.requires_grad for weight in teacher.parameters())  # untouched


def test_every_saved_file_is_one_that_the_stock_loader_tells_apart(student, tmp_path):
    save_lora(student, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LORA_FILE, "guidance_embedder.safetensors"}
    state_dict, metadata = SanaPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert all(".lora_" in name for name in state_dict)
    assert metadata["transformer.r"] == RANK and metadata["transformer.lora_alpha"] == ALPHA
    assert metadata["transformer.lora_bias"] is True
    state_dict, metadata = SanaTBCMPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert not any(name.endswith(".bias") for name in state_dict) and metadata["transformer.lora_bias"] is False
    assert SanaTBCMPipeline.lora_state_dict(tmp_path).keys() == state_dict.keys()
    assert metadata["transformer.rank_pattern"] == {}  # diffusers before 0.40 reads it in any case
