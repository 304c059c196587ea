"""Prompt embeddings: from the frozen text encoder, or computed once into a folder that training reads from.

Such a folder holds safetensors shards. Each has the `keys` of its n prompts (n,), 64-bit hashes of their text; all
tokens of the first prompt, then of the second and so on as `embeds` (tokens, D); `offsets` (n + 1,), the token that
each prompt begins with; and what encoded them as its metadata.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from hashlib import blake2b
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..files import written_beside
from ..pipeline_folder import SKIPPED_FILES
from ..transfer import to_device


logger = logging.get_logger(__name__)

UNCONDITIONAL = ""  # classifier-free guidance's prompt
METADATA = "encoder"  # one entry: safetensors writes several in an order that varies
WEIGHT_SAMPLE = 4096  # bytes of every weight tensor that an encoder is recognised by


class PromptEncoder:
    """Embeds prompts with a pipeline's frozen text encoder, each once while it stays in the cache.

    Args:
        pipeline: a Sana pipeline with tokenizer and text encoder.
        complex_human_instruction: lines put before every prompt but the empty one; None for none.
        max_sequence_length: tokens kept of a prompt.
        cache_size: prompts remembered, on the CPU, cut to their own length.
        device: where embeddings are computed and given; the pipeline's own by default.
        offload: keep the text encoder on the CPU while it is not computing.
    """

    def __init__(
        self,
        pipeline: SanaPipeline,
        *,
        complex_human_instruction: list[str] | None = None,
        max_sequence_length: int = 300,
        cache_size: int = 10_000,
        device: torch.device | str | None = None,
        offload: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.text_encoder = pipeline.text_encoder
        self.device = self.text_encoder.device if device is None else torch.device(device)
        self.offload = offload
        self.complex_human_instruction = complex_human_instruction
        self.max_sequence_length = max_sequence_length
        self.cache_size = cache_size
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed a batch, padded to its longest prompt only.

        Args:
            prompts: B prompts; the empty one is classifier-free guidance's.

        Returns:
            prompt_embeds (B, L, D) and prompt_attention_mask (B, L), on `device`.
        """
        for prompt in prompts:
            if prompt not in self._cache:
                self._cache[prompt] = self.encode(prompt)
            self._cache.move_to_end(prompt)
        if self.offload:
            self.text_encoder.to("cpu")
        rows = [self._cache[prompt] for prompt in prompts]
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return _pad(rows, self.device)

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        """Embed one prompt, past the cache and by itself: in a batch, its company may change how it is rounded.

        Args:
            prompt: the prompt; the empty one is classifier-free guidance's.

        Returns:
            Its embedding (tokens, D), on the CPU, in the text encoder's dtype.
        """
        self.text_encoder.to(self.device)
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=None if prompt == UNCONDITIONAL else self.complex_human_instruction,
        )
        return embeds[0, : int(mask.sum())].cpu()


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
        keys, places = [np.empty(0, np.int64)], [np.empty((0, 3), np.int64)]
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as file:
                    found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
                    _check_fingerprint(self.folder, found, fingerprint)
                    keys.append(file.get_tensor("keys"))
                    offsets = file.get_tensor("offsets")
            except (OSError, SafetensorError) as error:
                logger.warning(f"{str(path)!r} is torn, its prompts count as missing: {error}")
                continue
            shard = np.full(len(offsets) - 1, len(self._shards))
            places.append(np.stack([shard, offsets[:-1], offsets[1:]], axis=1))
            self._shards.append(path)
        order = np.argsort(np.concatenate(keys), kind="stable")
        self._keys = np.concatenate(keys)[order]
        self._places = np.concatenate(places)[order]  # shard, first token, token after the last

    def __len__(self) -> int:
        return len(self._keys)

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a batch, padded to its longest prompt only.

        Args:
            prompts: B prompts; the empty one is classifier-free guidance's.

        Returns:
            prompt_embeds (B, L, D) and prompt_attention_mask (B, L), on `device`.

        Raises:
            ValueError: where a prompt is not in the folder, or its shard is gone or torn.
        """
        found = self._find(prompts)
        if (found < 0).any():
            raise ValueError(
                f"prompt {prompts[int(found.argmin())]!r} is not among the {len(self)} embedded in"
                f" {str(self.folder)!r}: run precompute_embeddings on that folder again, which adds what is missing"
            )
        return _pad([self._read(*place) for place in self._places[found].tolist()], self.device)

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

    def _read(self, shard: int, start: int, stop: int) -> torch.Tensor:
        path = self._shards[shard]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice("embeds")[start:stop]
        except (OSError, SafetensorError) as error:
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cache = EmbeddingCache(folder, fingerprint)
    wanted = list(dict.fromkeys([UNCONDITIONAL, *prompts]))
    # A prompt's process depends on its place alone, so none is embedded twice however the processes are timed.
    own = range(process_index * shard_size, len(wanted), num_processes * shard_size)
    shards = [missing for start in own if (missing := cache.missing(wanted[start : start + shard_size]))]
    if not shards:
        return 0
    encoder = make_encoder()
    total = sum(map(len, shards))
    with tqdm(total=total, desc="Embedding prompts", unit="prompt", disable=process_index > 0) as progress:
        for shard in shards:
            rows = []
            for prompt in shard:
                rows.append(encoder.encode(prompt))
                progress.update()
            _write_shard(folder, shard, rows, fingerprint)
    return total


def encoder_fingerprint(
    teacher_folder: str | PathLike[str],
    *,
    complex_human_instruction: list[str] | None,
    max_sequence_length: int,
    dtype: torch.dtype,
) -> dict[str, str]:
    """Say what an embedding depends on beside its prompt, without loading the encoder.

    Weights are told apart by the layout of their files and the first bytes of every tensor, all else by whole files.

    Args:
        teacher_folder: a Sana pipeline's folder.
        complex_human_instruction: lines put before every prompt but the empty one; None for none.
        max_sequence_length: tokens kept of a prompt.
        dtype: the precision the text encoder runs in.

    Returns:
        A short text for each: two fingerprints are equal where they would embed every prompt alike.
    """
    instruction = "\n".join(complex_human_instruction or [])
    return {
        "text_encoder": digest_files(Path(teacher_folder) / "text_encoder"),
        "tokenizer": digest_files(Path(teacher_folder) / "tokenizer"),
        "complex_human_instruction": blake2b(instruction.encode(), digest_size=8).hexdigest()
        if instruction
        else "none",
        "max_sequence_length": str(max_sequence_length),
        "dtype": str(dtype).removeprefix("torch."),
    }


def digest_files(folder: Path) -> str:
    """Digest a component's folder: the first bytes of every weight tensor and all of every other file.

    Args:
        folder: of a pipeline's component.

    Returns:
        16 hexadecimal digits.
    """
    digest = blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or any(fnmatch(path.name, pattern) for pattern in SKIPPED_FILES):
            continue
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix != ".safetensors":
            digest.update(path.read_bytes())
            continue
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            digest.update(json.dumps(tensors, sort_keys=True).encode())
            for start, stop in sorted(tensor["data_offsets"] for tensor in tensors.values()):
                file.seek(8 + len(header) + start)
                digest.update(file.read(min(stop - start, WEIGHT_SAMPLE)))
    return digest.hexdigest()


def _check_fingerprint(folder: Path, found: dict[str, str], expected: dict[str, str]) -> None:
    differences = [
        f"{name} is {found.get(name)}, not {value}" for name, value in expected.items() if found.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{str(folder)!r} holds embeddings of another encoder: {'; '.join(differences)}. Choose another folder, or"
            " delete this one to embed the prompts again"
        )


def _keys(prompts: Sequence[str]) -> np.ndarray:
    """64 bits a prompt: among ten million, two share theirs with a chance of 3e-6."""
    digests = b"".join(blake2b(prompt.encode(), digest_size=8).digest() for prompt in prompts)
    return np.frombuffer(digests, dtype="<i8")


def _write_shard(folder: Path, prompts: list[str], rows: list[torch.Tensor], fingerprint: dict[str, str]) -> None:
    keys = _keys(prompts)
    tensors = {
        "keys": torch.tensor(keys),
        "offsets": torch.tensor([0, *map(len, rows)]).cumsum(0),
        "embeds": torch.cat(rows),
    }
    # Named by its prompts: embedded again, a torn shard is replaced and no other one is.
    path = folder / f"{blake2b(keys.tobytes(), digest_size=8).hexdigest()}.safetensors"
    with written_beside(path) as partial:
        save_file(tensors, partial, metadata={METADATA: json.dumps(fingerprint)})


def _pad(rows: list[torch.Tensor], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
    embeds, mask = (to_device(pad_sequence(part, batch_first=True), device) for part in (rows, masks))
    return embeds, mask
