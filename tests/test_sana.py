"""What is Sana's own: its students, its time, its latents, and how its networks are recognised."""

import copy
import json

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny import tiny_sana_pipeline, tiny_transformer, write_tiny_pipeline
from toy_networks import network_inputs

from diffusers_tbcm.backbones import backbone_of, find_backbone, sana
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.lora import make_lora_student
from diffusers_tbcm.text import Text
from diffusers_tbcm.trigflow import TrigFlowTransformer


def test_a_family_is_found_by_network_pipeline_and_folder(tmp_path):
    pipeline = tiny_sana_pipeline()
    assert backbone_of(pipeline) is backbone_of(pipeline.transformer) is sana
    assert backbone_of(make_lora_student(pipeline.transformer, rank=2)) is sana
    assert find_backbone(write_tiny_pipeline(tmp_path)) is sana
    with pytest.raises(ValueError, match="`model` is a Linear, and the families known are SanaTransformer2DModel"):
        backbone_of(torch.nn.Linear(2, 2))
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "PixArtTransformer2DModel"]}))
    with pytest.raises(ValueError, match=r"PixArtTransformer2DModel.*known are SanaTransformer2DModel"):
        find_backbone(tmp_path)


@pytest.mark.parametrize(("config", "scale"), [(0.001, 1.0), (1.0, 1.0), (1000.0, 1000.0)])
def test_a_config_of_0_001_marks_a_network_trained_on_s_itself(config, scale):
    assert sana.timestep_scale(tiny_transformer(timestep_scale=config)) == scale
    assert TrigFlowTransformer(tiny_transformer(timestep_scale=config)).timestep_scale == scale


def test_velocity_is_the_stock_networks_output_and_a_view_can_be_copied():
    transformer = tiny_transformer(guidance_embeds=True)
    sample, t, embeds, mask = network_inputs()
    guidance = torch.tensor([4.0, 4.5, 5.0])
    with torch.no_grad():
        expected = transformer(
            sample.float(),
            encoder_hidden_states=embeds.float(),
            timestep=t,
            guidance=guidance * transformer.config.guidance_embeds_scale,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        view = TrigFlowTransformer(transformer)
        found = sana.velocity(transformer, sample.float(), t, Text(embeds, mask), guidance)
        # A prompt a row: the sums of attention go in the same order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        again = copy.deepcopy(view)
        assert torch.equal(again(sample, t, embeds, mask, guidance), view(sample, t, embeds, mask, guidance))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_starts_equal_to_a_teacher_without_guidance(dtype):
    teacher = tiny_transformer(timestep_scale=0.001).to(dtype).requires_grad_(False)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student = make_student(teacher, guidance_embeds_scale=0.2)
    sample, t, embeds, mask = network_inputs()
    expected = TrigFlowTransformer(teacher)(sample, t, embeds, mask)
    for guidance in (torch.zeros(3), torch.tensor([1.0, 4.5, 1e4])):
        assert torch.equal(TrigFlowTransformer(student)(sample, t, embeds, mask, guidance), expected)
    assert student.config.guidance_embeds and student.config.guidance_embeds_scale == 0.2
    assert student.config.timestep_scale == 0.001 and student.dtype == dtype
    assert all(parameter.requires_grad for parameter in student.parameters())
    renamed = {name.replace("time_embed.emb.", "time_embed."): weight for name, weight in before.items()}
    copied = {name: weight for name, weight in student.state_dict().items() if "guidance_embedder" not in name}
    assert copied.keys() == renamed.keys() and all(torch.equal(copied[name], renamed[name]) for name in renamed)

    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert not teacher.config.guidance_embeds and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


def test_student_learns_from_guidance_at_its_first_step():
    student = make_student(tiny_transformer())
    sample, t, embeds, mask = network_inputs()
    TrigFlowTransformer(student)(sample, t, embeds, mask, torch.full((3,), 4.5)).square().mean().backward()
    assert student.time_embed.guidance_embedder.linear_2.weight.grad.norm() > 0


def test_student_of_a_teacher_with_guidance_is_a_copy():
    teacher = tiny_transformer(guidance_embeds=True)
    student = make_student(teacher, guidance_embeds_scale=0.1)
    sample, t, embeds, mask = network_inputs()
    outputs = [
        TrigFlowTransformer(network)(sample, t, embeds, mask, torch.full((3,), guidance))
        for network, guidance in ((teacher, 4.5), (student, 4.5), (student, 5.0))
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], rtol=1e-3)
    with pytest.raises(ValueError, match=r"`guidance_embeds_scale` is 0\.2"):
        make_student(teacher, guidance_embeds_scale=0.2)


def test_student_is_saved_as_a_plain_transformer(tmp_path):
    student = make_student(tiny_transformer())
    student.save_pretrained(tmp_path)
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.guidance_embeds
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in student.state_dict().items())


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_the_students_time_embedding_stays_in_float32_under_autocast(guidance_embeds):
    student = make_student(tiny_transformer(guidance_embeds=guidance_embeds))
    t, guidance = torch.tensor([0.2, 1.2]), torch.tensor([0.45, 0.4])
    exact = student.time_embed(t, guidance=guidance, hidden_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = student.time_embed(t, guidance=guidance, hidden_dtype=torch.bfloat16)
        assert student.patch_embed.proj(torch.ones(1, student.config.in_channels, 2, 2)).dtype == torch.bfloat16
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(mixed, exact, strict=True))


@pytest.mark.parametrize("shards", ["1GB", "5KB"])
def test_half_precision_weights_are_loaded_where_they_are_asked_for(tmp_path, shards):
    write_tiny_pipeline(tmp_path)
    half = tiny_sana_pipeline().to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half", variant="bf16", max_shard_size=shards)
    for component in ("transformer", "vae", "text_encoder"):
        for path in (tmp_path / "half" / component).glob("*.bf16*"):
            path.rename(tmp_path / component / path.name)
    for variant in (None, "bf16"):
        found = {
            "transformer": sana.load_transformer(tmp_path, variant),
            "vae": sana.load_vae(tmp_path, variant),
            "text_encoder": sana.load_text_pipeline(tmp_path, torch.float32, variant).text_encoder,
        }
        for name, model in found.items():
            for key, weight in getattr(half, name).state_dict().items():
                assert model.state_dict()[key].dtype == torch.float32
                assert torch.equal(model.state_dict()[key], weight.float()) or variant is None, (name, key)
        assert (
            not all(  # the ordinary ones are finer
                torch.equal(weight, weight.bfloat16().float()) for weight in found["vae"].parameters()
            )
            or variant == "bf16"
        )


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_when_loaded(tmp_path, component, value):
    write_tiny_pipeline(tmp_path)
    path = next((tmp_path / component).glob("*.safetensors"))
    weights = load_file(path)
    last = sorted(weights)[-1]
    weights[last].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    load = {"transformer": sana.load_transformer, "vae": sana.load_vae}
    with pytest.raises(ValueError, match=rf"its weights are not all finite, {last} of its {component}"):
        load.get(component, lambda folder: sana.load_text_pipeline(folder, torch.float32))(tmp_path)


def test_a_text_encoder_or_tokenizer_that_cannot_be_loaded_is_named_in_one_line(tmp_path):
    write_tiny_pipeline(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"teacher .* cannot be loaded: ") as refused:
        sana.load_text_pipeline(tmp_path, torch.float32)
    assert "\n" not in str(refused.value)
    for path in (tmp_path / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"`tokenizer` reads every prompt alike|cannot be loaded: "):
        sana.load_text_pipeline(tmp_path, torch.float32)
