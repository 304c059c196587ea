"""diffusers' own means of speed and memory, on `SanaTBCMPipeline`."""

import diffusers
import pytest
import torch
from diffusers import PipelineQuantizationConfig
from packaging.version import Version
from tiny import generate, tiny_tbcm_pipeline

from diffusers_tbcm import SanaTBCMPipeline


CPU = torch.device("cpu")


@pytest.fixture
def pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def plain_images():
    return generate(tiny_tbcm_pipeline())


def test_compiled_block_by_block(pipeline, plain_images):
    for block in pipeline.transformer.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)  # no C++ compiler needed
    assert torch.equal(generate(pipeline), plain_images)


def test_compiled_as_a_whole(pipeline, plain_images):
    pipeline.transformer.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(generate(pipeline), plain_images)
    with torch.compiler.set_stance("fail_on_recompile"):  # neither the step nor the guidance scale is compiled in
        generate(pipeline, num_inference_steps=4, guidance_scale=4.2)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.40"), reason="this diffusers offloads to a GPU only")
def test_group_offload(pipeline, plain_images, offload_type):
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipeline.enable_group_offload(onload_device=CPU, offload_type=offload_type, **blocks)
    assert torch.equal(generate(pipeline), plain_images)
    assert torch.equal(generate(SanaTBCMPipeline.from_pipe(pipeline)), plain_images)


def test_layerwise_casting(pipeline, plain_images):
    stored = torch.float8_e4m3fn
    pipeline.transformer.enable_layerwise_casting(storage_dtype=stored, compute_dtype=torch.float32)
    assert pipeline.transformer.transformer_blocks[0].attn1.to_q.weight.dtype == stored
    images = generate(pipeline)
    assert 0 < (images - plain_images).abs().mean() < 0.05  # three bits of mantissa
    assert pipeline.transformer.transformer_blocks[0].attn1.to_q.weight.dtype == stored
    other = SanaTBCMPipeline.from_pipe(pipeline)  # the stock method would undo the casting
    assert other.transformer.transformer_blocks[0].attn1.to_q.weight.dtype == stored


def test_quantised_text_encoder(pipeline, plain_images, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    pipeline.save_pretrained(tmp_path)
    int8 = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = SanaTBCMPipeline.from_pretrained(
        tmp_path, quantization_config=PipelineQuantizationConfig(quant_mapping={"text_encoder": int8})
    )
    weight = loaded.text_encoder.layers[0].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter
    assert 0 < (generate(loaded) - plain_images).abs().mean() < 0.01  # seven bits of mantissa in one of the networks
