"""What diffusers and transformers call by another name from one version to the next; no other module has to know."""

from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from torch import nn


# How to install an extra, while no index has this package: what one has under its name would be somebody else's.
INSTALL = "`pip install '.[{extra}]'` at the top of the repository, or `pip install 'diffusers_tbcm-...whl[{extra}]'`"


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name the precision to load a diffusers model or pipeline in.

    diffusers before 0.40 loads float32, without an error, where the argument is called `dtype`; later versions are
    about to drop `torch_dtype`.

    Args:
        dtype: what `from_pretrained` is to load floating-point weights as.

    Returns:
        The keyword argument for `from_pretrained`.
    """
    major, minor = map(int, diffusers_version.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 40) else "torch_dtype": dtype}


def tokenizer_class(name: str) -> str:
    """Name the class that reads a `tokenizer.json`, as every version of transformers knows it.

    transformers 5 has one class of tokenizers for each model, named like those that read sentencepiece's files in
    transformers 4. The names that the latter has for readers of `tokenizer.json` it still understands.

    Args:
        name: the class as transformers 4 or 5 calls it, such as `"GemmaTokenizer"`.

    Returns:
        The name to write into a `model_index.json`, such as `"GemmaTokenizerFast"`.
    """
    return name if name.endswith("Fast") else f"{name}Fast"


def token_embedding(text_encoder: Any) -> nn.Embedding:
    """Give what embeds the tokens: transformers 4 does not name it for CLIP's text part.

    Args:
        text_encoder: of transformers.

    Returns:
        The layer.
    """
    if hasattr(text_encoder, "get_input_embeddings"):
        return text_encoder.get_input_embeddings()
    return text_encoder.embeddings.token_embedding
