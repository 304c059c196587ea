"""Prompt embeddings: from the frozen text encoder, or computed once into a folder that training reads from.

Such a folder holds safetensors shards. Each has the `keys` of its n prompts (n,), 64-bit hashes of their text; all
tokens of the first prompt, then of the second and so on as `embeds` (tokens, D); `offsets` (n + 1,), the token that
each prompt begins with; `pooled` (n, P) of networks that read it; and what encoded them as its metadata.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..backbones import backbone_of, find_backbone, text_components
from ..backbones.loading import text_encoders
from ..digests import digest_text
from ..pipeline_folder import digest_component
from ..text import Text
from .shards import TORN, ShardFolder, dtype_name, holds, own_shards, read_slice


UNCONDITIONAL = ""  # classifier-free guidance's prompt
CACHE_BYTES = 2**31  # of embeddings in memory: 15,000 prompts of Sana, 700 of SD3


class PromptEncoder:
    """Embeds prompts with a pipeline's frozen text encoder, each once while it stays in the cache.

    Args:
        pipeline: of a known family, with tokenizers and text encoders.
        complex_human_instruction: lines put before every prompt but the empty one; None for none.
        max_sequence_length: tokens kept of a prompt.
        cache_bytes: size of what is remembered, on the CPU.
        device: where embeddings are computed and given; the pipeline's own by default.
        offload: keep the text encoder on the CPU while it is not computing.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        complex_human_instruction: list[str] | None = None,
        max_sequence_length: int = 300,
        cache_bytes: int = CACHE_BYTES,
        device: torch.device | str | None = None,
        offload: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.backbone = backbone_of(pipeline)
        self.text_encoders = nn.ModuleList(text_encoders(pipeline).values())
        self.device = pipeline.text_encoder.device if device is None else torch.device(device)
        self.offload = offload
        self.complex_human_instruction = complex_human_instruction
        self.max_sequence_length = max_sequence_length
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[str, Text] = OrderedDict()
        self._cached_bytes = 0

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Embed a batch, padded to its longest prompt only.

        Args:
            prompts: B prompts; the empty one is classifier-free guidance's.

        Returns:
            Their text, on `device`.
        """
        for prompt in prompts:
            if prompt not in self._cache:
                self._cache[prompt] = self.encode(prompt)
                self._cached_bytes += self._cache[prompt].embeds.nbytes
            self._cache.move_to_end(prompt)
        if self.offload:
            self.text_encoders.to("cpu")
        text = Text.cat([self._cache[prompt] for prompt in prompts])
        while self._cached_bytes > self.cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].embeds.nbytes
        return text.to(self.device)

    @torch.no_grad()
    def encode(self, prompt: str) -> Text:
        """Embed one prompt, past the cache and by itself: in a batch, its company may change how it is rounded.

        Args:
            prompt: the prompt; the empty one is classifier-free guidance's.

        Returns:
            Its text, on the CPU, in the text encoder's dtype.

        Raises:
            ValueError: where it is not finite.
        """
        self.text_encoders.to(self.device)
        text = self.backbone.encode_prompt(
            self.pipeline,
            prompt,
            max_sequence_length=self.max_sequence_length,
            instruction=None if prompt == UNCONDITIONAL else self.complex_human_instruction,
            device=self.device,
        ).to("cpu")
        if not all(part.isfinite().all() for part in (text.embeds, text.pooled) if part is not None):
            raise ValueError(
                f"the text encoder's embeddings are not finite in {dtype_name(text.embeds.dtype)}, those of"
                f" {prompt!r}: use `mixed_precision` bf16 or no"
            )
        return text


class EmbeddingCache:
    """Gives the embeddings that `precompute_embeddings` wrote; called like a `PromptEncoder`, with the same result.

    In memory are 32 bytes a prompt; the embeddings of a batch are read when it is asked for.

    Args:
        folder: the folder of shards.
        fingerprint: `encoder_fingerprint` of the encoder that the embeddings have to come from.
        device: where batches go.

    Raises:
        ValueError: where the folder's embeddings come from another encoder; the message says what differs.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        fingerprint: dict[str, str],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder = Path(folder)
        self.device = device
        self._shards: list[Path] = []
        keys, places = [np.empty(0, np.int64)], [np.empty((0, 4), np.int64)]
        for path, tensors in _store(self.folder, fingerprint).whole(("keys", "offsets")):
            keys.append(tensors["keys"].numpy())
            offsets = tensors["offsets"].numpy()
            number = np.arange(len(offsets) - 1)
            places.append(
                np.stack([np.full_like(number, len(self._shards)), number, offsets[:-1], offsets[1:]], axis=1)
            )
            self._shards.append(path)
        order = np.argsort(np.concatenate(keys), kind="stable")
        self._keys = np.concatenate(keys)[order]
        self._places = np.concatenate(places)[order]  # shard, number in it, first token, token after the last

    def __len__(self) -> int:
        return len(self._keys)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Read a batch, padded to its longest prompt only.

        Args:
            prompts: B prompts; the empty one is classifier-free guidance's.

        Returns:
            Their text, on `device`.

        Raises:
            ValueError: where a prompt is not in the folder, or its shard is gone or torn.
        """
        found = self._find(prompts)
        if (found < 0).any():
            raise ValueError(
                f"prompt {prompts[int(found.argmin())]!r} is not among the {len(self)} embedded in"
                f" {str(self.folder)!r}: run precompute_embeddings on that folder again, which adds what is missing"
            )
        return Text.cat([self._read(*place) for place in self._places[found].tolist()]).to(self.device)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Say which prompts are not in the folder.

        Args:
            prompts: any number of prompts.

        Returns:
            Those without embedding, in the order given.
        """
        return [prompt for prompt, at in zip(prompts, self._find(prompts).tolist(), strict=True) if at < 0]

    def _find(self, prompts: Sequence[str]) -> np.ndarray:
        """The place of each prompt in the index; -1 where it has none."""
        keys = _keys(prompts)
        first, end = (np.searchsorted(self._keys, keys, side) for side in ("left", "right"))
        return np.where(first < end, first, -1)

    def _read(self, shard: int, number: int, start: int, stop: int) -> Text:
        path = self._shards[shard]
        try:
            embeds = read_slice(path, "embeds", slice(start, stop))
            pooled = read_slice(path, "pooled", slice(number, number + 1)) if holds(path, "pooled") else None
            return Text.unmasked(embeds[None], pooled)
        except TORN as error:
            raise ValueError(
                f"shard {str(path)!r} is missing or torn: run precompute_embeddings on its folder again, which"
                " redoes this shard only"
            ) from error


def precompute_embeddings(
    prompts: Sequence[str],
    make_encoder: Callable[[], PromptEncoder],
    folder: str | PathLike[str],
    fingerprint: dict[str, str],
    *,
    shard_size: int = 256,
    process_index: int = 0,
    num_processes: int = 1,
) -> int:
    """Embed the prompts that a folder lacks, and the empty one, into shards that are whole or not there.

    Stopped in any way, it goes on where it was: what finished shards hold is not computed again, whichever prompts
    are asked for next. Every process of a run takes its share of the shards; one run at a time writes to a folder.

    Args:
        prompts: the prompts.
        make_encoder: loads the encoder; called only where something is missing.
        folder: the folder of shards; created where it does not exist.
        fingerprint: the encoder's `encoder_fingerprint`.
        shard_size: prompts a shard, the most that an interruption costs each process.
        process_index: this process among those that share the work.
        num_processes: how many share it, all with the same prompts and shard size.

    Returns:
        How many prompts this process embedded.

    Raises:
        ValueError: where the folder's embeddings come from another encoder; the message says what differs.
    """
    cache = EmbeddingCache(folder, fingerprint)
    wanted = list(dict.fromkeys([UNCONDITIONAL, *prompts]))
    shares = own_shards(len(wanted), shard_size, process_index=process_index, num_processes=num_processes)
    shards = [missing for share in shares if (missing := cache.missing(wanted[share.start : share.stop]))]
    return _store(cache.folder, fingerprint).fill(
        shards, make_encoder, _embed, label="Embedding prompts", quiet=process_index > 0
    )


def encoder_fingerprint(
    teacher_folder: str | PathLike[str],
    *,
    complex_human_instruction: list[str] | None,
    max_sequence_length: int,
    dtype: torch.dtype,
    variant: str | None = None,
) -> dict[str, str]:
    """Say what an embedding depends on beside its prompt, without loading the encoder.

    Args:
        teacher_folder: a pipeline's folder.
        complex_human_instruction: lines put before every prompt but the empty one; None for none.
        max_sequence_length: tokens kept of a prompt.
        dtype: the precision the text encoder runs in.
        variant: the half-precision weights that it is loaded from; None for the ordinary ones.

    Returns:
        A short text for each: two fingerprints are equal where they would embed every prompt alike.
    """
    backbone, instruction = find_backbone(Path(teacher_folder)), "\n".join(complex_human_instruction or [])
    return {
        **{name: digest_component(teacher_folder, name, variant) for name in text_components(backbone)},
        "complex_human_instruction": digest_text(instruction) if instruction else "none",
        "max_sequence_length": str(max_sequence_length),
        "dtype": dtype_name(dtype),
    }


def _store(folder: Path, fingerprint: dict[str, str]) -> ShardFolder:
    return ShardFolder(
        folder,
        fingerprint,
        entry="encoder",
        items="prompts",
        others="embeddings of another encoder",
        redo="embed the prompts again",
    )


def _keys(prompts: Sequence[str]) -> np.ndarray:
    """64 bits a prompt: among ten million, two share theirs with a chance of 3e-6."""
    digests = b"".join(blake2b(prompt.encode(), digest_size=8).digest() for prompt in prompts)
    return np.frombuffer(digests, dtype="<i8")


def _embed(
    encoder: PromptEncoder, prompts: list[str], done: Callable[[int], object]
) -> tuple[str, dict[str, torch.Tensor]]:
    """Make a shard. It is named by its prompts: embedded again, a torn one is replaced and no other one is."""
    rows = []
    for prompt in prompts:
        rows.append(encoder.encode(prompt))
        done(1)
    keys = _keys(prompts)
    tensors = {
        "keys": torch.tensor(keys),
        "offsets": torch.tensor([0, *(row.embeds.shape[1] for row in rows)]).cumsum(0),
        "embeds": torch.cat([row.embeds[0] for row in rows]),
    }
    if pooled := [row.pooled for row in rows if row.pooled is not None]:
        tensors["pooled"] = torch.cat(pooled)
    return blake2b(keys.tobytes(), digest_size=8).hexdigest(), tensors
