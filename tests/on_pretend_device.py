"""What is done on the pretend device; `test_pretend_device.py` starts it in a process of its own."""

import json
import math
from collections import Counter

import pretend_device
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from families import FAMILIES
from pretend_device import waits
from runs import metrics
from safetensors.torch import load_file
from tiny import (
    generate,
    student_weights,
    tiny_sana_pipeline,
    tiny_tbcm_pipeline,
    tiny_transformer,
    write_tiny_flow_student,
)
from torch import nn

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.evaluation.features import MobileNetFeatures
from diffusers_tbcm.export.record import load_metrics
from diffusers_tbcm.lora import make_lora_student, save_lora
from diffusers_tbcm.scripts import (
    evaluate_student,
    prepare_teacher,
    train_cdm,
    train_dmd,
    train_sana_sprint,
    train_tbcm_distill,
)
from diffusers_tbcm.training.memory import activation_bytes
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.transfer import HostCopy, to_device
from examples.tbcm.conftest import arguments
from examples.tbcm.mini_teacher.emoji_metrics import TEACHER_DIR


pretend_device.install()
pretend_device.let_accelerate_scale_losses()
DEVICE = torch.device(pretend_device.NAME)
EVERYTHING = {"use_ema": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "train_batch_size": 2}
TIMES = {"rows_per_second", "peak_memory_gib"}


@pytest.fixture
def on(monkeypatch):
    """Lets what follows run on a device."""

    def choose(device):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))

    return choose


# The device itself


def on_device(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(4),
        lambda x: x @ torch.ones(4, 2),
        lambda x: torch.cat([x, torch.ones(3, 4)]),
        lambda x: torch.where(torch.ones(3, 4) > 0, x, 0.0),
        lambda x: torch.ones(3, 4).add_(x),
        lambda x: torch.tensor(1.0).add_(x.sum()),
        lambda x: x.gather(0, torch.zeros(1, 4, dtype=torch.long)),
        lambda x: torch.ones(3, 4)[x[:, 0].long()],
        lambda x: nn.functional.embedding(torch.tensor([0, 1]), x),
        lambda x: torch._foreach_lerp_([x], [torch.ones(3, 4)], 0.5),
        lambda x: x.normal_(generator=torch.Generator()),
        lambda x: torch.randn(2, generator=torch.Generator(DEVICE)),
        lambda x: torch.randn(2, device=DEVICE, generator=torch.Generator()),
        lambda x: nn.Linear(4, 2)(x),
    ],
)
def test_mixtures_are_refused(mix):
    with pytest.raises(RuntimeError, match=r"same device|device type for generator"):
        mix(on_device(3, 4))


def test_what_cuda_allows_is_allowed():
    x, number = on_device(3, 4), torch.tensor(2.0)
    torch.testing.assert_close((x * number).cpu(), x.cpu() * 2)
    torch.testing.assert_close(x[torch.tensor([0, 2])].cpu(), x.cpu()[[0, 2]])
    torch.testing.assert_close(torch.where(x > 0, x, torch.tensor(0.0)).cpu(), x.cpu().relu())
    x[torch.tensor([0])] = number
    assert (x[0].cpu() == 2).all()
    assert torch.randn(2, device=DEVICE, generator=torch.Generator(DEVICE)).device.type == DEVICE.type
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_it_differentiates_as_the_cpu_does():
    """Views that are changed in place, convolutions, attention and an optimiser."""

    def train(device):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2)).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            features = network(on_device(2, 3, 4, 4).to(device)) * 1
            features[:, 1:3].mul_(2)
            features.view(2, 2, 4, 16)[:, 1].add_(1)
            nn.functional.scaled_dot_product_attention(features, features, features).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return network.cpu().state_dict()

    torch.testing.assert_close(train(DEVICE), train("cpu"), rtol=1e-5, atol=1e-5)


def test_waiting_is_counted_and_a_copy_holds_nothing_before_it_has_arrived():
    x = on_device(3, 4)
    with pretend_device.counting() as found:
        assert (x > 5).any().item() is False
        x[x > 0]
        x.nonzero()
        x.cpu()
        torch.tensor([1.0], device=DEVICE)
    kinds = Counter(line.split(": ")[1] for line in found.elements())
    assert kinds == {
        "_local_scalar_dense": 1, "a mask as an index": 1, "nonzero": 1, "a copy to the host": 1,
        "a copy to the device": 1,
    }  # fmt: skip
    with pretend_device.counting() as found:
        copy = x.to("cpu", non_blocking=True)
        assert copy.isnan().all()  # nothing has been waited for
        early = HostCopy(x)
        x.add_(1)  # queued after the copy was
        torch.testing.assert_close(early.read() + 1, HostCopy(x).read())
        to_device(torch.ones(2), DEVICE)
    assert not found


def test_the_memory_plan_counts_there_as_on_the_cpu():
    inputs = (torch.ones(2, 4, 8, 8), torch.ones(2, 3, 16), torch.ones(2))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = tiny_transformer(guidance_embeds=True)

        def forward(self, sample, text, time):
            return self.transformer(sample, text, time, guidance=time).sample

    planned = activation_bytes(Network(), *inputs)
    there = activation_bytes(Network().to(DEVICE), *(value.to(DEVICE) for value in inputs))
    assert there == pytest.approx(planned, rel=0.2) and planned > 1e5  # attention by its formula keeps more


# Training


@pytest.fixture
def waits_of_step(monkeypatch):
    """What the host has waited for in each step, its checkpoint included."""
    update, seen = Run.update, {}

    def noting(run, *args, **kwargs):
        update(run, *args, **kwargs)
        seen[run.step] = Counter(waits)

    monkeypatch.setattr(Run, "update", noting)
    return lambda step: seen[step] - seen[step - 1]


def dmd_flags(prompts_file, shared):
    dmd = {"prompts_file": prompts_file, "route_steps": 3, "student_every": 2, "critic_learning_rate": 1e-3}
    return lambda **changes: arguments(**(shared | dmd | changes))


@pytest.mark.parametrize("method", ["tbcm", "cdm", "dmd", "sana_sprint"])
def test_training_there_is_training_on_the_cpu(
    method, flags, cdm_flags, picture_flags, prompts_file, shared_flags, on, waits_of_step, tmp_path, capsys
):
    """The same weights and figures; it resumes bit for bit; and no step waits but for what it has to know."""
    common = EVERYTHING | {"max_train_steps": 4, "checkpointing_steps": 2, "logging_steps": 4}
    main, build, quiet_step = {
        "tbcm": (train_tbcm_distill.main, flags, 3),
        "cdm": (train_cdm.main, cdm_flags, 4),
        "dmd": (train_dmd.main, dmd_flags(prompts_file, shared_flags), 4),
        "sana_sprint": (train_sana_sprint.main, picture_flags, 3),
    }[method]
    if method in ("cdm", "dmd"):
        common |= {"max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 6}
    on("cpu")
    main(build(output_dir=tmp_path / "cpu", **common))
    on(DEVICE)
    cache = {"precompute_embeddings": tmp_path / "embeddings"} if method == "sana_sprint" else {}
    if method == "sana_sprint":  # pictures are encoded there as well
        cache["latents_cache"] = tmp_path / "latents"
    command = build(**common, **cache)
    main(command)
    assert waits_of_step(quiet_step) == {}

    run, last = tmp_path / "run", f"checkpoint-{common['max_train_steps']}"
    there, here = student_weights(run), student_weights(tmp_path / "cpu")
    for name, weight in here.items():  # Adam enlarges rounding to the scale of the learning rate
        torch.testing.assert_close(there[name], weight, rtol=1e-3, atol=4e-4, msg=name)
    (logged,), (expected,) = metrics(run), metrics(tmp_path / "cpu")
    for name in expected.keys() - TIMES:
        assert logged[name] == pytest.approx(expected[name], rel=2e-2, abs=2e-3), name

    (run / last / "checkpoint.json").unlink()
    main([*command, "--resume_from_checkpoint", "latest"])
    resumed = student_weights(run)
    assert [name for name, weight in there.items() if not torch.equal(resumed[name], weight)] == []


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sana"])
@pytest.mark.parametrize("method", ["tbcm", "cdm"])
def test_other_families_train_there_as_on_the_cpu(method, name, flags, cdm_flags, on, tmp_path):
    if (method, name) == ("cdm", "flux"):
        pytest.skip("CDM asks for an unconditional branch")
    FAMILIES[name].make_pipeline().save_pretrained(tmp_path / "teacher")
    tbcm = {"guidance_scales": 4.5, "allow_plain_teacher": True, "logging_steps": 1, "learning_rate": 1e-4}
    main, build, own = (train_tbcm_distill.main, flags, tbcm) if method == "tbcm" else (train_cdm.main, cdm_flags, {})
    for device in (DEVICE, "cpu"):
        on(device)
        main(
            build(
                pretrained_model_name_or_path=tmp_path / "teacher",
                output_dir=tmp_path / str(device),
                resolution=64,
                max_sequence_length=FAMILIES[name].tokens,
                max_train_steps=2,
                validation_prompts=["a dog"],
                **own,
            )
        )
    there, here = (metrics(tmp_path / str(device)) for device in (DEVICE, "cpu"))
    for logged, expected in zip(there, here, strict=True):
        for figure in expected.keys() - TIMES:
            assert logged[figure] == pytest.approx(expected[figure], rel=2e-2, abs=2e-3), figure


@pytest.mark.parametrize("method", ["tbcm", "cdm"])
def test_adapters_in_bf16_with_pictures_on_the_way(method, flags, cdm_flags, on, tmp_path):
    common = {"rank": 2, "mixed_precision": "bf16", "merge_lora": True, "max_train_steps": 2, "logging_steps": 1}
    common |= {"validation_prompts": ["a dog"], "validation_steps": 1, "offload_text_encoder": True}
    main, build = (train_tbcm_distill.main, flags) if method == "tbcm" else (train_cdm.main, cdm_flags)
    on(DEVICE)
    main(build(precompute_embeddings=tmp_path / "embeddings", **common))
    on("cpu")
    main(build(output_dir=tmp_path / "cpu", **common))
    run = tmp_path / "run"
    assert (run / "validation" / "step-1.png").is_file() and (run / "validation" / "step-2.png").is_file()
    there, here = (load_file(next((folder / "lora").glob("*.safetensors"))) for folder in (run, tmp_path / "cpu"))
    assert there.keys() == here.keys()
    loss = "loss" if method == "tbcm" else "critic_loss"
    assert metrics(run)[0][loss] == pytest.approx(metrics(tmp_path / "cpu")[0][loss], rel=0.1)


def test_a_plain_teacher_is_prepared_there_as_on_the_cpu(shared_flags, prompts_file, plain_teacher, on, tmp_path):
    short = {"route_steps": 3, "held_out_prompts": 2, "max_train_steps": 2, "logging_steps": 1, **EVERYTHING}
    short |= {"checkpointing_steps": 2, "learning_rate": 1e-3}
    told = shared_flags | {"pretrained_model_name_or_path": plain_teacher, "prompts_file": prompts_file} | short
    for device in (DEVICE, "cpu"):
        on(device)
        prepare_teacher.main(arguments(**told | {"output_dir": tmp_path / str(device)}))
    there, here = (metrics(tmp_path / str(device)) for device in (DEVICE, "cpu"))
    for logged, expected in zip(there, here, strict=True):
        for figure in expected.keys() - TIMES:
            assert logged[figure] == pytest.approx(expected[figure], rel=2e-2, abs=2e-3), figure
    there, here = (student_weights(tmp_path / str(device)) for device in (DEVICE, "cpu"))
    for name, weight in here.items():  # Adam enlarges rounding to the scale of the learning rate
        torch.testing.assert_close(there[name], weight, rtol=1e-3, atol=4e-3, msg=name)


def test_a_loss_scale_of_fp16(flags, on, tmp_path):
    on(DEVICE)
    main = train_tbcm_distill.main
    main(flags(mixed_precision="fp16", optimizer="came", max_train_steps=3, logging_steps=1, max_skipped_steps=3))
    run = tmp_path / "run"
    assert (run / "checkpoint-3" / "scaler.pt").is_file()
    assert all(math.isfinite(line["loss"]) for line in metrics(run))


# Drawing and measuring


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    tiny_tbcm_pipeline().save_pretrained(folder / "tbcm")
    write_tiny_flow_student(folder / "flow")
    return folder


def move(pipeline):
    pipeline.to(DEVICE)


def offload_models(pipeline):
    pipeline.enable_model_cpu_offload(device=DEVICE.type)


def offload_layers(pipeline):
    pipeline.enable_sequential_cpu_offload(device=DEVICE.type)


def offload_groups(pipeline):
    pipeline.enable_group_offload(onload_device=DEVICE, offload_type="leaf_level")


@pytest.mark.parametrize("kind", ["tbcm", "stock tbcm", "flow"])
@pytest.mark.parametrize("place", [move, offload_models, offload_layers, offload_groups])
def test_pictures_are_those_of_the_cpu(students, kind, place):
    loader = SanaTBCMPipeline if kind == "tbcm" else DiffusionPipeline
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "use_resolution_binning": False}
    if kind == "flow":
        options["guidance_scale"] = 1.0

    def load():
        pipeline = loader.from_pretrained(students / kind.split()[-1])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    expected, pipeline = generate(load(), **options), load()
    place(pipeline)
    torch.manual_seed(1)  # of that device, too
    torch.testing.assert_close(generate(pipeline, **options).cpu(), expected, rtol=1e-4, atol=1e-4)
    for generator in (torch.Generator(DEVICE).manual_seed(1), None):
        other = generate(pipeline, generator=generator, **options).cpu()
        assert other.isfinite().all() and not torch.allclose(other, expected, atol=1e-3)


def test_a_picture_there_starts_from_a_picture_of_the_host(students):
    pipeline = SanaTBCMPipeline.from_pretrained(students / "tbcm")
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = generate(pipeline, output_type="pil")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for options in ({"image": picture, "strength": 0.4}, {"latents": noise}):
        expected = generate(pipeline.to("cpu"), **options)
        torch.testing.assert_close(generate(pipeline.to(DEVICE), **options).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_adapters_come_and_go_there(guidance_embeds, tmp_path):
    """Loaded, weighed, merged and taken out again, of a teacher that was moved before."""
    student = make_lora_student(tiny_transformer(guidance_embeds=guidance_embeds), rank=2)
    torch.manual_seed(0)
    for weight in student.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    save_lora(student, tmp_path / "lora", guidance_scale=None if guidance_embeds else 4.5)
    pictures = {}
    for device in ("cpu", DEVICE):
        pipeline = SanaTBCMPipeline.from_pipe(tiny_sana_pipeline(guidance_embeds=guidance_embeds)).to(device)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(tmp_path / "lora", adapter_name="a")
        drawn = [generate(pipeline)]
        pipeline.set_adapters("a", 0.5)
        drawn += [generate(pipeline), generate(pipeline, attention_kwargs={"scale": 0.5})]
        if guidance_embeds:
            pipeline.disable_lora()
            drawn.append(generate(pipeline))
            pipeline.enable_lora()
        pipeline.set_adapters("a")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        pipeline.save_pretrained(tmp_path / str(device))
        drawn += [generate(pipeline), generate(SanaTBCMPipeline.from_pretrained(tmp_path / str(device)))]
        pictures[device] = torch.cat([picture.cpu() for picture in drawn])
    torch.testing.assert_close(pictures[DEVICE], pictures["cpu"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("student", ["tbcm", "flow"])
def test_an_evaluation_there_is_one_on_the_cpu(student, students, teacher, on, monkeypatch, tmp_path):
    monkeypatch.setattr(MobileNetFeatures, "num_components", 4)
    prompts = [f"{count} {colour} dogs" for count in range(4) for colour in ("red", "green", "blue")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    found = {}
    for device in ("cpu", DEVICE):
        on(device)
        folder = tmp_path / str(device)
        flags = f"""--model {students / student} --teacher {teacher} --prompts_file {tmp_path / "prompts.jsonl"}
            --caption_column prompt --output_dir {folder} --steps 1 --teacher_steps 1 --reference_teacher
            --max_sequence_length 16 --no-complex_human_instruction --resolution 64 --bootstrap_resamples 20
            --text_image_head {TEACHER_DIR} --num_images_per_prompt 2 --debug"""
        evaluate_student.main(flags.split())
        found[device] = load_metrics(folder)
    for there, here in zip(found[DEVICE].measurements, found["cpu"].measurements, strict=True):
        assert there.metrics.keys() == here.metrics.keys()
        for name in here.metrics.keys() - {"s / image"}:  # pictures may differ by one level
            assert there.metrics[name] == pytest.approx(here.metrics[name], rel=5e-2, abs=5e-2), name
    assert found[DEVICE].details["hardware"].startswith(DEVICE.type.upper())
