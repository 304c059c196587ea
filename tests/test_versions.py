"""The names that one version of diffusers or transformers has and another has not."""

import pytest
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from tiny import write_tiny_pipeline

from diffusers_tbcm import versions
from diffusers_tbcm.versions import dtype_argument, tokenizer_class


def test_the_dtype_is_understood_by_models_and_pipelines(tmp_path):
    folder = write_tiny_pipeline(tmp_path)
    model = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer", **dtype_argument(torch.bfloat16))
    pipeline = SanaPipeline.from_pretrained(folder, vae=None, **dtype_argument(torch.bfloat16))
    assert model.dtype == pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("version", "name"),
    [("0.36.0", "torch_dtype"), ("0.39.1", "torch_dtype"), ("0.40.0", "dtype"), ("1.0.0.dev0", "dtype")],
)
def test_the_dtypes_name_goes_by_diffusers_version(monkeypatch, version, name):
    monkeypatch.setattr(versions, "diffusers_version", version)
    assert dtype_argument(torch.float16) == {name: torch.float16}


def test_a_tokenizer_is_named_as_every_transformers_knows_it():
    assert tokenizer_class("GemmaTokenizer") == tokenizer_class("GemmaTokenizerFast") == "GemmaTokenizerFast"
