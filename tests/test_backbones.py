"""What every family has to do: compute what its stock pipeline does, and be trained, adapted, saved and drawn."""

import copy
import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_networks import SIGMA_DATA

from diffusers_tbcm import backbones, dual
from diffusers_tbcm.backbones import Backbone, backbone_of, backbone_of_pipeline, find_backbone, flux
from diffusers_tbcm.backbones.time_embedding import slow_sinusoids, time_layers
from diffusers_tbcm.data.embeddings import EmbeddingCache, PromptEncoder, encoder_fingerprint, precompute_embeddings
from diffusers_tbcm.dense_time import compare_embeddings, record_branches, to_dense_time
from diffusers_tbcm.dual import Dual, checkpoint_dual
from diffusers_tbcm.evaluation.drawing import draw_pictures, load_pipeline
from diffusers_tbcm.export.folders import save_flow_student
from diffusers_tbcm.export.record import StudentDescription
from diffusers_tbcm.export.selection import select_files
from diffusers_tbcm.flow import FlowTransformer, flow_step
from diffusers_tbcm.guidance import guidance_branches, guided_output
from diffusers_tbcm.images import pixels_to_pil
from diffusers_tbcm.lora import LORA_FILE, adapt, merge_lora, save_adapters
from diffusers_tbcm.pipeline_folder import copied_components, flow_shift
from diffusers_tbcm.rollout import record_rollout
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler, even_sigmas
from diffusers_tbcm.scheduling_tbcm import TBCMScheduler
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.memory import activation_bytes, recomputed_bytes
from diffusers_tbcm.training.preparation import merge_teachers_lora
from diffusers_tbcm.trajectory import record_trajectory, reference_route, rotate
from diffusers_tbcm.trigflow import (
    TrigFlowTransformer,
    consistency_output,
    flow_to_trig_output,
    trig_to_flow_sample,
    trig_to_flow_timestep,
)


PROMPTS = ["a red fox", "", "three little birds and a dog"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def pipeline(family):
    made = family.make_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    saved = tmp_path_factory.mktemp("teacher")
    pipeline.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def encode(family, pipeline):
    return PromptEncoder(pipeline, max_sequence_length=family.tokens)


@pytest.fixture(scope="module")
def shape(family, pipeline, folder):
    return family.backbone.latent_shape(folder, pipeline.transformer, 64)


def noise_of(shape, batch=2, dtype=torch.float32):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def test_every_family_is_tested_and_has_the_names_that_a_backbone_has():
    assert [family.backbone for family in FAMILIES.values()] == list(backbones.FAMILIES)
    names = [name for name in vars(Backbone) if not name.startswith("_")]
    assert len(names) > 25
    for backbone in backbones.FAMILIES:
        assert [name for name in names if not hasattr(backbone, name)] == []
        for name in names:
            if inspect.isfunction(vars(Backbone)[name]):
                asked = list(inspect.signature(vars(Backbone)[name]).parameters)[1:]
                taken = list(inspect.signature(getattr(backbone, name)).parameters.values())
                assert [parameter.name for parameter in taken[: len(asked)]] == asked, name
                assert all(parameter.default is not parameter.empty for parameter in taken[len(asked) :]), name


def test_a_family_is_found_by_network_pipeline_and_folder(family, pipeline, folder):
    assert backbone_of(pipeline) is backbone_of(pipeline.transformer) is find_backbone(folder) is family.backbone
    assert backbone_of(adapt(copy.deepcopy(pipeline.transformer), rank=2)) is family.backbone
    assert backbone_of_pipeline(type(pipeline).__name__) is family.backbone
    absent = {name for name, part in pipeline.components.items() if part is None}
    assert {"transformer", "scheduler", *copied_components(folder)} == {*pipeline.components} - absent


def test_what_diffusers_is_too_old_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "FAMILIES", backbones.FAMILIES[:2])
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "LongCatImageTransformer2DModel"]}')
    with pytest.raises(ValueError, match=r"has a LongCat.*: that needs diffusers 0\.37 or newer, and 0\."):
        find_backbone(tmp_path)


def test_a_network_says_what_it_is_made_of(family, pipeline, folder, shape):
    backbone, transformer = family.backbone, pipeline.transformer
    ran = []
    hooks = [
        block.register_forward_hook(lambda block, *_: ran.append(block)) for block in backbone.blocks(transformer)
    ]
    hooks.append(backbone.after_blocks(transformer).register_forward_hook(lambda norm, *_: ran.append(norm)))
    with torch.no_grad():
        FlowTransformer(transformer)(noise_of(shape), torch.rand(2), **text_of(family).arguments())
    for hook in hooks:
        hook.remove()
    assert ran == [*backbone.blocks(transformer), backbone.after_blocks(transformer)]
    assert TrigFlowTransformer(transformer).time_dim == backbone.embed_time(transformer, torch.rand(1), None).shape[1]
    assert backbone.embeds_guidance(transformer) is (backbone.__name__ == flux.__name__)
    factor = backbone.vae_scale_factor(folder)
    assert factor == pipeline.vae_scale_factor and shape[-1] * factor == 64
    assert backbone.latent_shape(folder, transformer, None) == (shape[0], *[backbone.native_size(transformer)] * 2)
    for resolution in (20, 0):
        with pytest.raises(ValueError, match=rf"`resolution` is {resolution}: "):
            backbone.latent_shape(folder, transformer, resolution)


def text_of(family, prompts=2, dtype=torch.float32):
    """Random text of the tiny pipeline's sizes, of one length, without padding."""
    pipeline = family.make_pipeline()
    one = PromptEncoder(pipeline, max_sequence_length=family.tokens).encode("a dog")
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(prompts, *one.embeds.shape[1:], generator=generator).to(dtype)
    pooled = None if one.pooled is None else torch.randn(prompts, one.pooled.shape[1], generator=generator).to(dtype)
    return Text.unmasked(embeds, pooled)


def unguided(family):
    """Arguments of a stock call that reads a plain prompt and adds no guidance."""
    return family.backbone.guidance_arguments(1.0, 1) | family.unguided_call


# -- parity with the stock pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_euler_sampling_with_guidance_is_the_stock_pipelines(family, pipeline, folder, encode, shape, guidance_scale):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = family.stock_latents(
        pipeline(
            prompt=[PROMPTS[0], PROMPTS[2]], num_inference_steps=5, height=64, width=64, generator=generators,
            output_type="latent", **family.backbone.guidance_arguments(guidance_scale, 2), **family.unguided_call,
            **family.guided_call,
        ).images
    )  # fmt: skip
    teacher = FlowTransformer(pipeline.transformer)
    times, sigmas = pipeline.scheduler.timesteps / 1000, pipeline.scheduler.sigmas
    text, negative, scale = encode([PROMPTS[0], PROMPTS[2]]), encode([""]), torch.full((2,), guidance_scale)
    branches = guidance_branches(teacher, text, negative)
    sample = torch.cat([family.first_noise(shape, torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    if not teacher.guidance_embeds:  # one with an unconditional branch, which preparation records
        recorded = record_branches(teacher, sample, sigmas[:-1].expand(2, -1), text, negative, scale)
        assert (recorded.pred_original_sample - expected).norm() < 1e-6 * expected.norm()
    with torch.no_grad():
        for time, s, next_s in zip(times, sigmas[:-1], sigmas[1:], strict=True):
            velocity = guided_output(teacher, sample, time.expand(2), branches, scale)
            sample = flow_step(sample, velocity, s.expand(2), next_s.expand(2))
    # Not bit for bit: sums of float32 go in another order, as Sana's prompts are padded otherwise, SD3's unguided
    # pipeline has half the batch, and 1000 s / 1000 is not s.
    assert sample.shape == expected.shape and (sample - expected).norm() < 1e-6 * expected.norm()
    print(f"{type(pipeline).__name__}, guidance {guidance_scale}: {(sample - expected).norm() / expected.norm():.1e}")


def test_a_guided_f_is_the_guided_velocity_seen_as_f(family, pipeline, encode, shape):
    text, negative, scale = encode([PROMPTS[0], PROMPTS[2]]), encode([""]), torch.tensor([2.0, 4.5])
    velocity, network = (wrapper(pipeline.transformer) for wrapper in (FlowTransformer, TrigFlowTransformer))
    branches = guidance_branches(velocity, text, negative)
    sample, t = noise_of(shape), torch.tensor([0.4, 1.3])
    s, flow_sample = trig_to_flow_timestep(t), trig_to_flow_sample(sample, t, sigma_data=1.0)
    with torch.no_grad():
        found = guided_output(network, sample, t, branches, scale)
        expected = flow_to_trig_output(flow_sample, guided_output(velocity, flow_sample, s, branches, scale), s)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_steps_of_a_flow_student_are_those_of_the_stock_scheduler(family, pipeline, folder, shape):
    backbone = family.backbone
    tokens = backbone.image_tokens(pipeline.transformer, shape)
    shift = flow_shift(folder, tokens)
    steps = {"sigmas": even_sigmas(4), "num_inference_steps": 200}  # which klein's shift depends on
    pipeline(prompt="a dog", **steps, height=64, width=64, **unguided(family))
    s = torch.tensor(even_sigmas(4))
    shifted = shift * s / (1 + (shift - 1) * s)
    if last := pipeline.scheduler.config.shift_terminal:  # a teacher's own times are stretched to end there
        shifted = 1 - (1 - shifted) * (1 - last) / (1 - shifted[-1])
    torch.testing.assert_close(pipeline.scheduler.sigmas[:-1], shifted)


def test_prompts_are_embedded_as_the_stock_pipeline_does(family, folder, tmp_path, pipeline, shape, monkeypatch):
    """What the stock pipeline hands to its network is what a folder of embeddings gives."""
    read = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *a, **k: read.append((a, k)) or forward(*a, **k))
    fingerprint = encoder_fingerprint(
        folder, complex_human_instruction=None, max_sequence_length=family.tokens, dtype=torch.float32
    )
    precompute_embeddings(
        PROMPTS,
        lambda: PromptEncoder(
            family.backbone.load_text_pipeline(folder, torch.float32), max_sequence_length=family.tokens
        ),
        tmp_path / "cache",
        fingerprint,
        shard_size=2,
    )
    cache = EmbeddingCache(tmp_path / "cache", fingerprint)
    for prompt in PROMPTS:
        read.clear()
        pipeline(prompt=prompt, num_inference_steps=1, height=64, width=64, **unguided(family))
        ((places, named),) = read
        given = family.given_text(*places, **named)
        text, length = cache([prompt]), int(cache([prompt]).mask.sum())
        torch.testing.assert_close(text.embeds[:, :length], given[:, :length], atol=1e-5, rtol=0)
        mask = named.get("encoder_attention_mask")
        assert length == (given.shape[1] if mask is None else int(mask.sum()))
        if "pooled_projections" in named:
            torch.testing.assert_close(text.pooled, named["pooled_projections"])
    several = cache(PROMPTS)
    for place, prompt in enumerate(PROMPTS):
        alone = cache([prompt])
        assert torch.equal(several.embeds[place, : alone.embeds.shape[1]], alone.embeds[0])
        assert several.pooled is None or torch.equal(several.pooled[place], alone.pooled[0])


def test_a_teacher_that_lacks_a_weight_is_not_trained_from(family, folder, tmp_path):
    backbone, lacking = family.backbone, shutil.copytree(folder, tmp_path / "teacher")
    for component in ("transformer", "vae", "text_encoder"):
        (file,) = (lacking / component).glob("*.safetensors")
        _, *others = sorted(weights := load_file(file))
        save_file({other: weights[other] for other in others}, file, metadata={"format": "pt"})
    for load in (
        backbone.load_transformer,
        backbone.load_vae,
        lambda folder: backbone.load_text_pipeline(folder, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"teacher .* it lacks 1 of the weights of a \w+, such as "):
            load(lacking)


def test_latents_are_encoded_and_decoded_as_by_the_stock_classes(family, pipeline, folder, shape):
    backbone, vae = family.backbone, family.backbone.load_vae(folder)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_pixels(vae, pixels)
    assert latents.shape == (2, *shape) and latents.dtype == torch.float32
    with torch.no_grad():
        raw, expected = family.encode(pipeline.vae, pixels)
        torch.testing.assert_close(latents, expected)
        decoded = pipeline.vae.decode(raw).sample.clamp(-1, 1)
        torch.testing.assert_close(backbone.decode_latents(vae, latents), decoded.reshape(pixels.shape))
    # The stock call's picture of its own latents
    arguments = {"num_inference_steps": 2, "height": 64, "width": 64, **unguided(family)}
    drawn = [
        pipeline(prompt="a dog", generator=torch.Generator().manual_seed(0), output_type=kind, **arguments).images
        for kind in ("latent", "pt")
    ]
    picture = backbone.decode_latents(vae, family.stock_latents(drawn[0])) / 2 + 0.5
    torch.testing.assert_close(picture, drawn[1], rtol=0, atol=2e-6)  # klein's latents are taken off unit scale twice


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_consistency_student_is_drawn_by_its_angles(family, pipeline, shape, encode, steps):
    """The stock pipeline and its scheduler draw what f(x_t, t) = cos t x_t - sin t sigma_data F gives, noised anew."""
    backbone, student = family.backbone, copy.copy(pipeline)
    student.scheduler = FlowStudentScheduler(stochastic_sampling=True)
    scheduler, network, text = TBCMScheduler(), TrigFlowTransformer(pipeline.transformer), encode(["a dog", "an owl"])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    def noise(draw):
        return SIGMA_DATA * torch.cat([draw(shape, generator) for generator in generators])

    scheduler.set_timesteps(steps)
    sample = noise(family.first_noise)
    for number, t in enumerate(scheduler.timesteps[:-1]):
        with torch.no_grad():
            output = network(sample / SIGMA_DATA, t.expand(2), **text.arguments())
        sample = consistency_output(sample, output, t.expand(2))
        if number < steps - 1:
            after = scheduler.timesteps[number + 1]
            sample = after.cos() * sample + after.sin() * noise(family.step_noise)
    expected = pixels_to_pil(backbone.decode_latents(pipeline.vae, sample / SIGMA_DATA) / 2 + 0.5)
    found = draw_pictures(
        student, ["a dog", "an owl"], [torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=steps, guidance_scale=1.0, height=64, width=64, **family.unguided_call,
    )  # fmt: skip
    for picture, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(other)).max() <= 1  # rounded to 8 bits


# -- time


def test_a_student_starts_as_its_teacher_and_embeds_time_in_float32(family, pipeline, shape):
    backbone, text = family.backbone, text_of(family)
    student = backbone.make_student(copy.deepcopy(pipeline.transformer).requires_grad_(False))
    assert all(weight.requires_grad for weight in student.parameters())
    guidance = torch.tensor([4.0, 5.0]) if backbone.STUDENT_EMBEDS_GUIDANCE else None
    embeds_guidance = backbone.STUDENT_EMBEDS_GUIDANCE or backbone.embeds_guidance(pipeline.transformer)
    assert backbone.embeds_guidance(student) is embeds_guidance
    inputs, networks = (noise_of(shape), torch.tensor([0.4, 1.3])), (student, pipeline.transformer)
    with torch.no_grad():
        found, expected = (
            TrigFlowTransformer(network, 1.0)(*inputs, **text.arguments(), guidance=told)
            for network, told in zip(networks, (guidance, None), strict=True)
        )
        assert torch.equal(found, expected)
        time = torch.tensor([0.31, 0.77])
        exact = backbone.embed_time(student, time, guidance)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(backbone.embed_time(student, time, guidance), exact)
    if not backbone.STUDENT_EMBEDS_GUIDANCE:  # then its pipeline is the teacher's
        assert student.state_dict().keys() == pipeline.transformer.state_dict().keys()


def test_the_tangent_under_autocast_is_that_of_float32(family, pipeline, shape):
    """To the rounding of activations: time itself is not rounded, where 1000 s would be by up to 2."""
    transformer, text = copy.deepcopy(pipeline.transformer), text_of(family)
    with torch.no_grad():  # the default initialisation hardly answers to time
        for weight in transformer.get_submodule(family.backbone.TIME_EMBEDDER).parameters():
            weight.mul_(3)
    student = family.backbone.make_student(transformer)
    guidance = torch.full((4,), 4.5) if family.backbone.STUDENT_EMBEDS_GUIDANCE else None
    sample, t = noise_of(shape, 4), torch.tensor([0.3, 0.7, 1.1, 1.5])
    network, directions = TrigFlowTransformer(student, 1.0), (noise_of(shape, 4).flip(0), torch.ones(4))
    found = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            dual_inputs = Dual(sample, directions[0]), Dual(t, directions[1])
            found.append(network(*dual_inputs, **text.arguments(), guidance=guidance))
    for name in ("primal", "tangent"):
        exact, rounded = (getattr(output, name).flatten(1) for output in found)
        error = (rounded - exact).norm(dim=1) / exact.norm(dim=1)
        print(f"{type(transformer).__name__} {name}: {error.tolist()}")
        assert error.max() < 0.05


def test_a_prepared_network_is_close_to_the_plain_one_and_answers_smoothly(family, pipeline, folder, shape):
    """The plain one is made of a smooth embedding of time and a little jitter."""
    backbone, transformer = family.backbone, copy.deepcopy(pipeline.transformer)
    embedder = transformer.get_submodule(backbone.TIME_EMBEDDER)
    slow = slow_sinusoids(family.sinusoids_of(transformer))
    with torch.no_grad():
        time_layers(embedder)[0].weight[:, ~slow] *= 0.05
        time_layers(embedder)[0].weight[:, slow] *= 5
    scale = (
        1000.0 if backbone.STUDENT_EMBEDS_GUIDANCE else backbone.timestep_scale(transformer)
    )  # Sana's is in dense time
    plain = FlowTransformer(transformer.requires_grad_(False), scale)
    assert not backbone.in_dense_time(transformer, scale)
    prepared = to_dense_time(plain)
    fit = compare_embeddings(plain, prepared)
    assert backbone.in_dense_time(prepared.transformer, prepared.timestep_scale)
    assert fit.residual < 0.1 and fit.modulation_residual < 0.1 and fit.slope_after < 0.5 * fit.slope_before
    sample, s, text = noise_of(shape), torch.tensor([0.2, 0.9]), text_of(family)
    with torch.no_grad():
        found, expected = (network(sample, s, **text.arguments()) for network in (prepared, plain))
    assert (found - expected).norm() < 0.05 * expected.norm()


# -- training


def test_rows_of_a_prompt_share_it(family, pipeline, shape):
    transformer, text = FlowTransformer(pipeline.transformer), text_of(family)
    sample, s = noise_of(shape, 4), torch.tensor([0.2, 0.9, 0.5, 0.7])
    with torch.no_grad():
        found = transformer(sample, s, **text.arguments())
        torch.testing.assert_close(found, transformer(sample, s, **text.repeat(2).arguments()), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, transformer(sample, s, **text.roll(1).arguments()), atol=1e-3)
        assert not torch.allclose(found, transformer(sample, s.flip(0), **text.arguments()), atol=1e-4)
    with pytest.raises(ValueError, match="`encoder_hidden_states` has 2 prompts for 3 rows"):
        transformer(sample[:3], s[:3], **text.arguments())


def test_a_recorded_trajectory_is_the_guided_way_step_by_step(family, pipeline, shape, encode):
    teacher = TrigFlowTransformer(pipeline.transformer)
    text, negative, scale = encode(["a dog", "an owl and a fox"]), encode([""]), torch.tensor([2.0, 4.5])
    route = reference_route(4).repeat(2, 1)
    recording = record_trajectory(teacher, noise_of(shape), route, text, negative, scale)
    sample = SIGMA_DATA * noise_of(shape)
    branches = guidance_branches(teacher, text, negative)
    with torch.no_grad():
        for step in range(4):
            velocity = SIGMA_DATA * guided_output(teacher, sample / SIGMA_DATA, route[:, step], branches, scale)
            if step:
                torch.testing.assert_close(recording.latents[:, step - 1], sample, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(recording.velocity[:, step - 1], velocity, rtol=1e-5, atol=1e-5)
            after = route[:, step + 1] if step < 3 else torch.zeros(2)
            sample = rotate(sample, velocity, route[:, step] - after)
    torch.testing.assert_close(recording.pred_original_sample, sample, rtol=1e-5, atol=1e-5)


def test_a_rollout_ends_where_the_stock_pipeline_does(family, pipeline, folder, shape, encode):
    """A flow student's rollout at guidance 1, as CDM records it, is what its stock pipeline will draw."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    drawn = pipeline(
        prompt=["a dog", "an owl"], sigmas=even_sigmas(4), height=64, width=64, generator=generators,
        output_type="latent", **unguided(family),
    ).images  # fmt: skip
    expected = family.stock_latents(drawn)
    noise = torch.cat([family.first_noise(shape, torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    student, text = FlowTransformer(pipeline.transformer), encode(["a dog", "an owl"])
    found = record_rollout(student, noise, pipeline.scheduler.sigmas, torch.tensor([3, 3]), text)
    assert (found.pred_original_sample - expected).norm() < 1e-6 * expected.norm()


def test_the_tangent_is_the_derivative(family, shape, monkeypatch, capsys):
    """Dual numbers against central differences, in float64 throughout: the networks' own float32 is taken out."""
    text = text_of(family, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    transformer = family.make_pipeline().transformer.double()
    network = TrigFlowTransformer(transformer, timestep_scale=1.0)  # as a consistency teacher has it
    sample = noise_of(shape, dtype=torch.float64)
    t, step = torch.tensor([0.4, 1.3], dtype=torch.float64), 1e-7  # LongCat-Image has sin(1000 s)
    directions = noise_of(shape, dtype=torch.float64).flip(0), torch.tensor([1.0, -0.7], dtype=torch.float64)
    slow = []
    forward_mode = dual._by_forward_mode
    monkeypatch.setattr(
        dual, "_by_forward_mode", lambda func, *a, **k: slow.append(func.__name__) or forward_mode(func, *a, **k)
    )
    with torch.no_grad():
        found = network(Dual(sample, directions[0]), Dual(t, directions[1]), **text.arguments())
        ahead, behind = (
            network(sample + sign * step * directions[0], t + sign * step * directions[1], **text.arguments())
            for sign in (1, -1)
        )
    difference = (ahead - behind) / (2 * step)
    error = (found.tangent - difference).norm() / difference.norm()
    with capsys.disabled():
        print(f"\n{type(transformer).__name__}: tangent to {error:.0e}, slow: {', '.join(sorted({*slow})) or 'none'}")
    assert error < 1e-7
    assert not slow


def test_one_pass_gives_gradient_and_tangent_of_two_with_checkpoints_or_without(family, pipeline, shape):
    """Gradients of a plain pass, tangent of PyTorch's forward mode."""
    transformer = copy.deepcopy(pipeline.transformer).train()
    network = TrigFlowTransformer(transformer, timestep_scale=1.0)
    sample, text, t = noise_of(shape), text_of(family), torch.tensor([0.4, 1.3])
    directions = noise_of(shape).flip(0), torch.tensor([1.0, -0.7])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda x, t: network(x, t, **text.arguments()), (sample, t), directions)
    weights = [weight for weight in transformer.parameters() if weight.requires_grad]

    def gradients(output):
        found = torch.autograd.grad(output.square().sum(), weights, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    expected = gradients(network(sample, t, **text.arguments()))
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing(checkpoint_dual)
        found = network(Dual(sample, directions[0]), Dual(t, directions[1]), **text.arguments())
        assert (found.tangent - tangent).norm() < 1e-5 * tangent.norm()
        gradient = gradients(found.primal)
        assert expected.norm() > 0 and (gradient - expected).norm() < 1e-5 * expected.norm()
        plain = gradients(network(sample, t, **text.arguments()))
        assert (plain - expected).norm() < 1e-6 * expected.norm()


def test_the_memory_plan_counts_checkpoints(family, shape):
    transformer = family.make_pipeline().transformer
    network, text = FlowTransformer(transformer), text_of(family)
    inputs = noise_of(shape), torch.rand(2)
    everything = activation_bytes(network, *inputs, **text.arguments())
    transformer.enable_gradient_checkpointing()
    assert 0 < activation_bytes(network, *inputs, **text.arguments()) < everything
    assert 0 < recomputed_bytes(network, *inputs, **text.arguments()) < everything
    network(*inputs, **text.arguments())  # nothing of a plan, whose tensors hold no values, has stayed in the network
    assert activation_bytes(network, *inputs, **text.arguments()) < everything  # nor what has in a plan's way


def test_a_step_at_the_published_size_has_its_shapes_and_stays_on_its_device(family):
    """On tensors without data, which refuse to meet tensors of the CPU."""
    config, shape, text_shape, pooled_size = family.published
    with torch.device("meta"):
        transformer = family.backbone.TRANSFORMER_CLASS(**config)
        transformer.enable_gradient_checkpointing()
        network = FlowTransformer(transformer.train())
    pooled = None if pooled_size is None else torch.zeros(1, pooled_size, device="meta")
    text = Text.unmasked(torch.zeros(1, *text_shape, device="meta"), pooled)
    output = network(torch.zeros(2, *shape, device="meta"), torch.ones(2, device="meta"), **text.arguments())
    assert output.shape == (2, *shape) and output.device.type == "meta" and output.dtype == torch.float32
    output.sum().backward()
    weights = [weight for block in family.backbone.blocks(transformer) for weight in block.parameters()]
    trained = [weight for weight in weights if weight.requires_grad]
    assert len(trained) >= len(weights) - 6 and all(weight.grad is not None for weight in trained)
    billions = sum(weight.numel() for weight in transformer.parameters()) / 1e9
    assert round(billions, 1) == family.billions


# -- adapters


def test_adapters_are_in_every_block_and_every_target_is_a_layer(family, pipeline):
    adapted = adapt(copy.deepcopy(pipeline.transformer), rank=2)
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert names and all(".lora_" in name for name in names)
    for target in family.backbone.LORA_TARGET_MODULES:
        assert any(f".{target}.lora_A" in f".{name}" for name in names), target
    for block in family.backbone.blocks(adapted):
        assert any(".lora_A" in name for name, _ in block.named_parameters())


def save_random_adapters(pipeline, folder):
    """Adapters that change what a network computes; the network with them."""
    adapted = adapt(copy.deepcopy(pipeline.transformer), rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    save_adapters(adapted, folder)
    return adapted


def test_saved_adapters_make_the_stock_pipeline_the_merged_network(family, pipeline, folder, shape, tmp_path):
    adapted = save_random_adapters(pipeline, tmp_path)
    stock = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(family.backbone.OPTIONAL_COMPONENTS))
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(tmp_path)
    else:
        assert issubclass(type(stock.transformer), PeftAdapterMixin)
        stock.transformer.load_lora_adapter(tmp_path, weight_name=LORA_FILE)
    inputs, text = (noise_of(shape), torch.rand(2)), text_of(family)
    with torch.no_grad():
        found, merged, before = (
            FlowTransformer(network)(*inputs, **text.arguments())
            for network in (stock.transformer, merge_lora(adapted), pipeline.transformer)
        )
    assert (merged - before).norm() > 1e-2 * before.norm()
    assert (found - merged).norm() < 1e-5 * merged.norm()


def test_a_lora_is_merged_into_the_teacher(family, pipeline, folder, shape, tmp_path):
    adapted = save_random_adapters(pipeline, tmp_path)
    transformer = family.backbone.load_transformer(folder)
    digest = merge_teachers_lora(family.backbone, transformer, folder, str(tmp_path), 1.0)
    assert len(digest) == 16 and transformer.state_dict().keys() == pipeline.transformer.state_dict().keys()
    inputs, text = (noise_of(shape), torch.rand(2)), text_of(family)
    with torch.no_grad():
        found, merged = (
            FlowTransformer(network)(*inputs, **text.arguments()) for network in (transformer, merge_lora(adapted))
        )
    assert (found - merged).norm() < 1e-5 * merged.norm()


def test_an_optional_component_is_copied_where_the_teacher_has_it(tmp_path):
    """LongCat-Image's prompt rewriter: no code of it is loaded here, as it would need torchvision."""
    if "longcat_image" not in FAMILIES:
        pytest.skip("this diffusers has no LongCat-Image")
    pipeline, teacher = FAMILIES["longcat_image"].make_pipeline(), tmp_path / "teacher"
    pipeline.save_pretrained(teacher)
    description = StudentDescription("a dog", {"steps": 1})
    scheduler = FlowStudentScheduler(3.0, {"height": 64, "width": 64})
    for name in ("without", "with"):
        if name == "with":
            shutil.copytree(teacher / "tokenizer", teacher / "text_processor")
            (teacher / "text_processor" / "preprocessor_config.json").write_text('{"patch_size": 14}')
            index = json.loads((teacher / "model_index.json").read_text())
            index["text_processor"] = ["transformers", "Qwen2VLProcessor"]
            (teacher / "model_index.json").write_text(json.dumps(index))
        save_flow_student(pipeline.transformer, teacher, tmp_path / name, description, scheduler=scheduler)
        published = {file for file in select_files(tmp_path / name).files if file.startswith("text_processor/")}
        expected = {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} if name == "with" else ()
        assert published == {f"text_processor/{file}" for file in expected}
        student = load_pipeline(tmp_path / name, device="cpu")
        assert type(student) is type(pipeline) and student.text_processor is None
    (teacher / "text_processor" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"text_processor/preprocessor_config\.json is no JSON file"):
        save_flow_student(pipeline.transformer, teacher, tmp_path / "torn", description, scheduler=scheduler)
