"""Captioned pictures and their latents, encoded once into a folder that training reads from.

Such a folder holds safetensors shards of n pictures that follow each other in the data set, named by the first's
number. Each has their `latents` times the autoencoder's scaling factor, (n, channels, height, width), and what they
were made of as its metadata.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderDC
from diffusers.utils import logging
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..files import written_beside
from ..images import fit_image
from .embeddings import digest_files


logger = logging.get_logger(__name__)

METADATA = "source"  # one entry: safetensors writes several in an order that varies


class CaptionedImages:
    """The pictures of a `datasets` data set, decoded when they are asked for, and their captions.

    Args:
        source: what `datasets.load_dataset` takes: a Hub id, or a folder of pictures with a metadata.jsonl.
        config: the data set's configuration.
        split: the data set's split.
        image_column: the column of pictures.
        caption_column: the column of captions; each a text, or a list of texts that all fit.
        max_images: use no more pictures than this; None uses all.

    Raises:
        ValueError: where a column is missing or a caption is not text, or no picture has a caption.
    """

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        config: str | None = None,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "text",
        max_images: int | None = None,
    ) -> None:
        from datasets import load_dataset

        data = load_dataset(str(source), config, split=split)
        for column in (image_column, caption_column):
            if column not in data.column_names:
                raise ValueError(f"{str(source)!r} has no column {column!r}: it has {', '.join(data.column_names)}")
        captions = [_captions(entry, caption_column) for entry in data[caption_column]]
        chosen = [index for index, found in enumerate(captions) if found][:max_images]
        if not chosen:
            raise ValueError(f"none of the {len(data)} pictures of {str(source)!r} has a caption")
        if not all(captions):
            logger.warning(f"{captions.count(())} pictures of {str(source)!r} have no caption and are left out.")
        self.captions = [captions[index] for index in chosen]
        self._images = data.select(chosen).select_columns([image_column])
        self._column = image_column

    def __len__(self) -> int:
        return len(self.captions)

    def __str__(self) -> str:
        return f"{len(self)} pictures with {len(self.prompts)} different captions"

    def __getitem__(self, index: int) -> Image.Image:
        return self._images[index][self._column]

    @property
    def prompts(self) -> list[str]:
        """The different captions, in the order they come in."""
        return list(dict.fromkeys(caption for captions in self.captions for caption in captions))

    def pick_caption(self, index: int, generator: torch.Generator) -> str:
        """Choose one of a picture's captions at random.

        Args:
            index: the picture's number.
            generator: on the CPU; left alone where there is only one.

        Returns:
            The caption.
        """
        captions = self.captions[index]
        if len(captions) == 1:
            return captions[0]
        return captions[int(torch.randint(len(captions), (), generator=generator))]


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
        self._starts = set()
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            except (OSError, SafetensorError) as error:
                logger.warning(f"{str(path)!r} is torn, its pictures count as missing: {error}")
                continue
            differences = [
                f"{name} is {found.get(name)}, not {value}"
                for name, value in fingerprint.items()
                if found.get(name) != value
            ]
            if differences:
                raise ValueError(
                    f"{str(self.folder)!r} holds other latents: {'; '.join(differences)}. Choose another folder, or"
                    " delete this one to encode the pictures again"
                )
            self._starts.add(int(path.stem))

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
            with safe_open(_shard_path(self.folder, start), framework="pt") as file:
                return file.get_slice("latents")[index - start]
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"the latent of picture {index} is missing or torn in {str(self.folder)!r}: run precompute_latents on"
                " that folder again, which adds what is missing"
            ) from error


def precompute_latents(
    images: CaptionedImages,
    make_vae: Callable[[], AutoencoderDC],
    folder: str | PathLike[str],
    fingerprint: dict[str, str],
    *,
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
        resolution: the pictures' sides in pixels: they are resized to cover a square, and its centre is used.
        batch_size: pictures encoded together.
        process_index: this process among those that share the work.
        num_processes: how many share it.

    Returns:
        How many pictures this process encoded.

    Raises:
        ValueError: where the folder's latents were made of something else; the message says what differs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cache = LatentCache(folder, fingerprint)
    shard_size = int(fingerprint["shard_size"])
    own = range(process_index * shard_size, len(images), num_processes * shard_size)
    shards = [range(start, min(start + shard_size, len(images))) for start in own if not cache.has_shard(start)]
    if not shards:
        return 0
    vae = make_vae()
    total = sum(map(len, shards))
    with tqdm(total=total, desc="Encoding pictures", unit="picture", disable=process_index > 0) as progress:
        for shard in shards:
            latents = []
            for start in range(shard.start, shard.stop, batch_size):
                batch = range(start, min(start + batch_size, shard.stop))
                pixels = torch.cat([to_pixels(images[index], resolution) for index in batch])
                latents.append(encode_pixels(vae, pixels).to("cpu", vae.dtype))
                progress.update(len(batch))
            path = _shard_path(folder, shard.start)
            with written_beside(path) as partial:
                save_file(
                    {"latents": torch.cat(latents).contiguous()}, partial, metadata={METADATA: json.dumps(fingerprint)}
                )
    return total


def latents_fingerprint(
    images: CaptionedImages,
    teacher_folder: str | PathLike[str],
    *,
    resolution: int,
    dtype: torch.dtype,
    shard_size: int = 256,
) -> dict[str, str]:
    """Say what cached latents depend on, without loading the autoencoder or decoding a picture.

    Args:
        images: the pictures; data sets are told apart by all their captions, in order.
        teacher_folder: a Sana pipeline's folder.
        resolution: the pictures' sides in pixels.
        dtype: the precision the autoencoder runs in, and the latents are kept in.
        shard_size: pictures a shard, the most that an interruption costs each process.

    Returns:
        A short text for each.
    """
    captions = blake2b(json.dumps(images.captions).encode(), digest_size=8).hexdigest()
    return {
        "vae": digest_files(Path(teacher_folder) / "vae"),
        "captions": captions,
        "resolution": str(resolution),
        "dtype": str(dtype).removeprefix("torch."),
        "shard_size": str(shard_size),
    }


def to_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """Make a picture a square: on white where it is transparent, resized to cover it, cut around the centre.

    Args:
        image: of any mode and size.
        resolution: the square's sides in pixels.

    Returns:
        Pixels in [-1, 1], (1, 3, `resolution`, `resolution`), float32.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = VaeImageProcessor(do_resize=False, do_convert_rgb=True).preprocess(image)
    return fit_image(pixels, resolution, resolution)


@torch.no_grad()
def encode_pixels(vae: AutoencoderDC, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pictures.

    Args:
        vae: the autoencoder.
        pixels: in [-1, 1], (batch, 3, height, width).

    Returns:
        Latents times the autoencoder's scaling factor, (batch, channels, height, width), float32, on its device.
    """
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent.float() * vae.config["scaling_factor"]


def _captions(entry: Any, column: str) -> tuple[str, ...]:
    """What is written of one picture, without the empty ones."""
    captions = [entry] if entry is None or isinstance(entry, str) else entry
    if not isinstance(captions, list) or not all(caption is None or isinstance(caption, str) for caption in captions):
        raise ValueError(f"column {column!r} is neither text nor a list of texts: it holds {entry!r}")
    return tuple(caption.strip() for caption in captions if caption and caption.strip())


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.safetensors"
