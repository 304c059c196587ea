"""Prompts: where they come from, in which order they are seen, and their embeddings."""

from collections import OrderedDict
from functools import lru_cache
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline
from torch.nn.utils.rnn import pad_sequence


def read_prompts(path: str | PathLike[str]) -> list[str]:
    """Read a UTF-8 text file with one prompt a line; empty lines are left out.

    Args:
        path: the file.

    Returns:
        The prompts, in the file's order.

    Raises:
        ValueError: where the file is missing, is not UTF-8 or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts file {str(path)!r} does not exist")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {str(path)!r} is not UTF-8: byte {error.start} cannot be read") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts file {str(path)!r} holds no prompt: it needs one a line")
    return prompts


def load_dataset_prompts(dataset: str, *, config: str | None = None, split: str = "train", column: str) -> list[str]:
    """Take the captions of a `datasets` data set; its images, if any, are never decoded.

    Args:
        dataset: a Hub id, or a local folder or data file (csv, jsonl, parquet, ...).
        config: the data set's configuration.
        split: the split.
        column: the column that holds the captions.

    Returns:
        The captions that are not empty, in the data set's order.

    Raises:
        ValueError: where the column is missing, is not text or holds no prompt.
    """
    from datasets import load_dataset

    formats = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
    suffix = Path(dataset).suffix
    if Path(dataset).is_file() and suffix in formats:
        data = load_dataset(formats[suffix], data_files=dataset, split=split)
    else:
        data = load_dataset(dataset, config, split=split)
    if column not in data.column_names:
        raise ValueError(f"data set {dataset!r} has no column {column!r}: it has {', '.join(data.column_names)}")
    captions = list(data.select_columns([column])[column])
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        raise ValueError(f"column {column!r} of data set {dataset!r} is not text")
    prompts = [caption.strip() for caption in captions if caption and caption.strip()]
    if not prompts:
        raise ValueError(f"column {column!r} of data set {dataset!r} holds no prompt")
    return prompts


def prompt_at(draw: int, num_prompts: int, seed: int) -> int:
    """Say which prompt the run's draw number `draw` sees: every epoch is a permutation of its own.

    Args:
        draw: the run's count of prompts drawn, from 0, over all processes.
        num_prompts: how many prompts there are.
        seed: the run's seed.

    Returns:
        Index of the prompt.
    """
    epoch, position = divmod(draw, num_prompts)
    return int(_epoch_order(epoch, num_prompts, seed)[position])


@lru_cache(maxsize=2)
def _epoch_order(epoch: int, num_prompts: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


def draw_generator(draw: int, seed: int) -> torch.Generator:
    """Make the CPU generator that everything random about a draw comes from.

    Args:
        draw: the run's count of prompts drawn, from 0, over all processes.
        seed: the run's seed.

    Returns:
        A generator that depends on both numbers and on nothing else.
    """
    # torch's CPU generator reads 32 bits of its seed: hash the pair into them instead of adding it up.
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, draw]).generate_state(1)[0]))


class PromptEncoder:
    """Embeds prompts with a pipeline's frozen text encoder, each once while it stays in the cache.

    Args:
        pipeline: a Sana pipeline with tokenizer and text encoder.
        complex_human_instruction: lines put before every prompt but the empty one; None for none.
        max_sequence_length: tokens kept of a prompt.
        cache_size: prompts remembered, on the CPU, cut to their own length.
    """

    def __init__(
        self,
        pipeline: SanaPipeline,
        *,
        complex_human_instruction: list[str] | None = None,
        max_sequence_length: int = 300,
        cache_size: int = 10_000,
    ) -> None:
        self.pipeline = pipeline
        self.complex_human_instruction = complex_human_instruction
        self.max_sequence_length = max_sequence_length
        self.cache_size = cache_size
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed a batch, padded to its longest prompt only.

        Args:
            prompts: B prompts; the empty one is classifier-free guidance's.

        Returns:
            prompt_embeds (B, L, D) and prompt_attention_mask (B, L), on the text encoder's device.
        """
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._cache))
        for instructed in (True, False):
            group = [prompt for prompt in missing if bool(prompt) == instructed]
            if group:
                self._cache.update(zip(group, self._encode(group, instructed), strict=True))
        rows = [self._cache[prompt] for prompt in prompts]
        for prompt in prompts:
            self._cache.move_to_end(prompt)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
        device = self.pipeline.text_encoder.device
        return pad_sequence(rows, batch_first=True).to(device), pad_sequence(masks, batch_first=True).to(device)

    def _encode(self, prompts: list[str], instructed: bool) -> list[torch.Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=self.complex_human_instruction if instructed else None,
        )
        return [row[: int(keep.sum())].cpu() for row, keep in zip(embeds, mask, strict=True)]
