"""The latents of captioned pictures, encoded once into a folder that training reads from.

Such a folder holds safetensors shards of n pictures that follow each other in the data set, named by the first's
number. Each has their `latents` times the autoencoder's scaling factor, (n, channels, height, width), and what they
were made of as its metadata.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..backbones import Backbone
from ..images import to_pixels
from ..pipeline_folder import digest_component
from .pictures import CaptionedImages
from .shards import TORN, ShardFolder, dtype_name, own_shards, read_slice


class LatentCache:
    """Gives the latents that `precompute_latents` wrote; a batch is read when it is asked for.

    Args:
        folder: the folder of shards.
        fingerprint: `latents_fingerprint` of what the latents have to be made of.
        device: where batches go.

    Raises:
        ValueError: where the folder's latents were made of something else; the message says what differs.
    """

    def __init__(
        self, folder: str | PathLike[str], fingerprint: dict[str, str], *, device: torch.device | str = "cpu"
    ) -> None:
        self.folder = Path(folder)
        self.device = device
        self._shard_size = int(fingerprint["shard_size"])
        self._store = _store(self.folder, fingerprint)
        self._starts = {int(path.stem) for path, _ in self._store.whole()}

    def __call__(self, indices: Sequence[int]) -> torch.Tensor:
        """Read a batch.

        Args:
            indices: the pictures' numbers.

        Returns:
            Their latents times the autoencoder's scaling factor, (batch, channels, height, width), float32, on
            `device`.

        Raises:
            ValueError: where a picture is not in the folder, or its shard is gone or torn.
        """
        return torch.stack([self._read(index) for index in indices]).to(self.device, torch.float32)

    def has_shard(self, start: int) -> bool:
        """Say whether the shard that begins with picture `start` is there and whole."""
        return start in self._starts

    def _read(self, index: int) -> torch.Tensor:
        start = index - index % self._shard_size
        try:
            return read_slice(self._store.path(_shard_name(start)), "latents", index - start)
        except TORN as error:
            raise ValueError(
                f"the latent of picture {index} is missing or torn in {str(self.folder)!r}: run precompute_latents on"
                " that folder again, which adds what is missing"
            ) from error


def precompute_latents(
    images: CaptionedImages,
    make_vae: Callable[[], Any],
    folder: str | PathLike[str],
    fingerprint: dict[str, str],
    *,
    backbone: Backbone,
    resolution: int,
    batch_size: int = 8,
    process_index: int = 0,
    num_processes: int = 1,
) -> int:
    """Encode the pictures that a folder lacks, into shards that are whole or not there.

    Stopped in any way, it goes on where it was. Every process of a run takes its share of the shards; one run at a
    time writes to a folder.

    Args:
        images: the pictures.
        make_vae: loads the autoencoder, on the device and in the dtype it is to run in; called only where something is
            missing.
        folder: the folder of shards; created where it does not exist.
        fingerprint: `latents_fingerprint` of pictures, autoencoder and resolution.
        backbone: the autoencoder's family.
        resolution: the pictures' sides in pixels: they are resized to cover a square, and its centre is used.
        batch_size: pictures encoded together.
        process_index: this process among those that share the work.
        num_processes: how many share it.

    Returns:
        How many pictures this process encoded.

    Raises:
        ValueError: where the folder's latents were made of something else; the message says what differs.
    """
    cache = LatentCache(folder, fingerprint)
    shares = own_shards(
        len(images), int(fingerprint["shard_size"]), process_index=process_index, num_processes=num_processes
    )

    def encode(vae: Any, shard: range, done: Callable[[int], object]) -> tuple[str, dict[str, torch.Tensor]]:
        latents = []
        for start in range(shard.start, shard.stop, batch_size):
            batch = range(start, min(start + batch_size, shard.stop))
            pixels = torch.cat([to_pixels(images[index], resolution) for index in batch])
            latents.append(backbone.encode_pixels(vae, pixels).to("cpu", vae.dtype))
            done(len(batch))
        return _shard_name(shard.start), {"latents": torch.cat(latents).contiguous()}

    return _store(cache.folder, fingerprint).fill(
        [share for share in shares if not cache.has_shard(share.start)],
        make_vae,
        encode,
        label="Encoding pictures",
        quiet=process_index > 0,
    )


def latents_fingerprint(
    images: CaptionedImages,
    teacher_folder: str | PathLike[str],
    *,
    resolution: int,
    dtype: torch.dtype,
    variant: str | None = None,
    shard_size: int = 256,
) -> dict[str, str]:
    """Say what cached latents depend on, without loading the autoencoder or decoding a picture.

    Args:
        images: the pictures, told apart by their files, in order.
        teacher_folder: a Sana pipeline's folder.
        resolution: the pictures' sides in pixels.
        dtype: the precision the autoencoder runs in, and the latents are kept in.
        variant: the half-precision weights that the autoencoder is loaded from; None for the ordinary ones.
        shard_size: pictures a shard, the most that an interruption costs each process.

    Returns:
        A short text for each.
    """
    return {
        "vae": digest_component(teacher_folder, "vae", variant),
        "pictures": images.digest(),
        "resolution": str(resolution),
        "dtype": dtype_name(dtype),
        "shard_size": str(shard_size),
    }


def _store(folder: Path, fingerprint: dict[str, str]) -> ShardFolder:
    return ShardFolder(
        folder,
        fingerprint,
        entry="source",
        items="pictures",
        others="other latents",
        redo="encode the pictures again",
    )


def _shard_name(start: int) -> str:
    return f"{start:09d}"
