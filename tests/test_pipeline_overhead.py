"""What `SanaTBCMPipeline` does beside the calls of its networks."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline
from diffusers.image_processor import VaeImageProcessor
from packaging.version import Version
from tiny import LATENT_CHANNELS, TEXT_HIDDEN_SIZE, generate, tiny_tbcm_pipeline
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.images import pixels_to_pil


DEVICE = torch.device("meta")  # computes nothing, so that whatever needs a value of it fails


@pytest.fixture
def pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Transfers(TorchFunctionMode):
    """Notes every call that copies something of the host to the device, for which the host waits."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device == DEVICE:
            leaves = tree_leaves((args, kwargs))
            of_host = any(isinstance(value, torch.Tensor) and value.device != DEVICE for value in leaves)
            indices = args[1] if function is torch.Tensor.__getitem__ else ()
            of_list = any(isinstance(index, list) for index in (indices if isinstance(indices, tuple) else [indices]))
            if of_host or of_list or function in (torch.tensor, torch.as_tensor):
                self.found.append(function.__name__)
        return result


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_device_never_waits_between_text_encoder_and_decoder(pipeline, monkeypatch, steps):
    """Values read from the device raise, and values copied to it, but for the tokens, are found."""
    pipeline.to(DEVICE)
    transfers = Transfers()

    def encode(input_ids, attention_mask):  # transformers' own masks do read values
        transfers.__enter__()
        return (torch.empty(*input_ids.shape, TEXT_HIDDEN_SIZE, device=DEVICE),)

    monkeypatch.setattr(pipeline.text_encoder, "forward", encode)
    # The one value that is read, when all has been drawn.
    monkeypatch.setattr("diffusers_tbcm.pipeline_sana_tbcm.is_finite", lambda images: True)
    try:
        latents = pipeline(["a red fox", "an owl"], num_inference_steps=steps, output_type="latent").images
    finally:
        transfers.__exit__(None, None, None)
    assert latents.shape == (2, LATENT_CHANNELS, 8, 8) and latents.device == DEVICE
    assert transfers.found == []


def test_a_repeated_prompt_is_encoded_once(pipeline, monkeypatch):
    encoded = []
    forward = pipeline.text_encoder.forward

    def count(input_ids, **arguments):
        encoded.append(len(input_ids))
        return forward(input_ids, **arguments)

    monkeypatch.setattr(pipeline.text_encoder, "forward", count)
    arguments = {"max_sequence_length": 24, "complex_human_instruction": None}
    fox, owl = (pipeline.encode_prompt(prompt, **arguments) for prompt in ("a red fox", "an owl at night"))
    assert encoded == [1, 1]
    prompts = ["an owl at night", "a red fox", "an owl at night"]
    embeds, mask = pipeline.encode_prompt(prompts, num_images_per_prompt=2, **arguments)
    assert encoded[2:] == [2]
    torch.testing.assert_close(embeds, torch.cat([owl[0], owl[0], fox[0], fox[0], owl[0], owl[0]]))
    assert torch.equal(mask, torch.cat([owl[1], owl[1], fox[1], fox[1], owl[1], owl[1]]))
    assert torch.equal(embeds[0], embeds[5])  # one and the same


@pytest.mark.parametrize("instruction", [None, ["Enhance the prompt.", "Prompt: "]])
@pytest.mark.parametrize("length", [1, 2, 24])
def test_embeddings_are_those_of_the_stock_pipeline(pipeline, instruction, length):
    arguments = {"max_sequence_length": length, "complex_human_instruction": instruction}
    prompts = ["a red fox", "the long and winding road to the northern harbour"]
    for ours, stock in zip(
        pipeline.encode_prompt(prompts, **arguments),
        SanaSprintPipeline.encode_prompt(pipeline, prompts, **arguments),
        strict=True,
    ):
        assert torch.equal(ours, stock)


def test_the_text_encoder_takes_its_lora_scale(pipeline):
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = pipeline.encode_prompt("a red fox")[0]
    pipeline.text_encoder.add_adapter(lora)
    full = pipeline.encode_prompt("a red fox")[0]
    assert not torch.allclose(full, plain)
    torch.testing.assert_close(pipeline.encode_prompt("a red fox", lora_scale=0.0)[0], plain)
    assert torch.equal(pipeline.encode_prompt("a red fox")[0], full)  # the scale is gone after the call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_rounded_as_diffusers_rounds_them(dtype):
    halves = (torch.arange(255) + 0.5) / 255  # where rounding could go either way
    pixels = torch.cat([halves, torch.rand(3 * 16 * 20 - 255, generator=torch.Generator().manual_seed(0))])
    pixels = pixels.reshape(1, 3, 16, 20).repeat(2, 1, 1, 1).to(dtype)
    expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))
    pictures = pixels_to_pil(pixels)
    assert len(pictures) == 2 and pictures[0].size == (20, 16)
    assert all(np.array_equal(ours, stock) for ours, stock in zip(pictures, expected, strict=True))


def test_pictures_are_those_of_the_stock_pipeline(pipeline):
    stock = SanaSprintPipeline(**{**pipeline.components, "scheduler": pipeline.scheduler.to_stock()})
    time = {"num_inference_steps": 1, "max_timesteps": torch.pi / 2, "intermediate_timesteps": None}
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    expected = generate(stock, output_type="pil", **time, **size)[0]
    assert np.array_equal(generate(pipeline, num_inference_steps=1, output_type="pil")[0], expected)


def stock_execution_device(pipeline):
    return SanaSprintPipeline._execution_device.fget(pipeline)


def test_execution_device_is_that_of_the_stock_pipeline(pipeline):
    assert pipeline._execution_device == stock_execution_device(pipeline) == torch.device("cpu")
    pipeline.vae.to(DEVICE)
    assert pipeline._execution_device == stock_execution_device(pipeline)  # networks on several devices
    pipeline.to(DEVICE)
    assert pipeline._execution_device == stock_execution_device(pipeline) == DEVICE
    rest = {"text_encoder": None, "tokenizer": None}
    assert SanaTBCMPipeline(**{**pipeline.components, **rest})._execution_device == DEVICE


@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.40"), reason="this diffusers offloads to a GPU only")
def test_execution_device_is_where_layers_are_brought(pipeline):
    pipeline.to(DEVICE)
    pipeline.vae.enable_group_offload(torch.device("cpu"), offload_device=DEVICE, offload_type="leaf_level")
    assert pipeline._execution_device == stock_execution_device(pipeline) == torch.device("cpu")
