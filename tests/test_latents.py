"""The folder of pictures' latents."""

import pytest
import torch
from captioned import RESOLUTION, write_images
from PIL import Image
from tiny import LATENT_CHANNELS, tiny_vae, write_tiny_pipeline

from diffusers_tbcm.backbones import sana
from diffusers_tbcm.backbones.sana import encode_pixels
from diffusers_tbcm.data.latents import LatentCache, latents_fingerprint, precompute_latents
from diffusers_tbcm.data.pictures import CaptionedImages
from diffusers_tbcm.images import to_pixels


CAPTIONS = ["a fox", "a red fox", "a violin", "an owl", "a violin", "a cat", "the sun"]
SHARD_SIZE = 3


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return CaptionedImages(write_images(tmp_path_factory.mktemp("data") / "images", CAPTIONS))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def fingerprint(images, teacher):
    return describe(images, teacher)


def describe(images, teacher, **changes):
    settings = {"resolution": RESOLUTION, "dtype": torch.float32, "shard_size": SHARD_SIZE, **changes}
    return latents_fingerprint(images, teacher, **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def never():
    raise AssertionError("the autoencoder was loaded")


def complete(images, folder, fingerprint, make_vae=tiny_vae, **kwargs):
    options = {"backbone": sana, "resolution": RESOLUTION, "batch_size": 2}
    return precompute_latents(images, make_vae, folder, fingerprint, **options, **kwargs)


def test_latents_are_the_scaled_codes_bit_for_bit(tmp_path, images, fingerprint):
    assert complete(images, tmp_path, fingerprint) == len(images)
    vae = tiny_vae()
    batches = [[0, 1], [2], [3, 4], [5], [6]]  # two at a time, within shards of three
    expected = torch.cat(
        [encode_pixels(vae, torch.cat([to_pixels(images[i], RESOLUTION) for i in batch])) for batch in batches]
    )
    code = vae.encode(to_pixels(images[2], RESOLUTION)).latent
    torch.testing.assert_close(expected[2:3], vae.config.scaling_factor * code)
    cache = LatentCache(tmp_path, fingerprint)
    for indices in (range(7), [6, 0, 4], [2, 2]):
        found = cache(indices)
        assert torch.equal(found, expected[list(indices)]) and found.dtype == torch.float32
    assert cache([1]).shape == (1, LATENT_CHANNELS, 2, 2)
    assert sorted(contents(tmp_path)) == [f"{start:09d}.safetensors" for start in (0, 3, 6)]


def test_half_precision_latents_are_kept_in_it(tmp_path, images, teacher):
    fingerprint = describe(images, teacher, dtype=torch.bfloat16)
    complete(images, tmp_path, fingerprint, lambda: tiny_vae().bfloat16())
    found = LatentCache(tmp_path, fingerprint)([0])
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())


def test_a_complete_folder_needs_no_autoencoder(tmp_path, images, fingerprint):
    complete(images, tmp_path, fingerprint)
    before = contents(tmp_path)
    assert complete(images, tmp_path, fingerprint, never) == 0 and contents(tmp_path) == before


def test_an_interrupted_run_goes_on_after_its_finished_shards(tmp_path, images, fingerprint):
    class Interrupted:
        """The pictures, of which the sixth cannot be read at first."""

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            if index == 5:
                raise KeyboardInterrupt
            return images[index]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    complete(images, whole, fingerprint)
    with pytest.raises(KeyboardInterrupt):
        complete(Interrupted(), broken, fingerprint)
    assert [*contents(broken)] == ["000000000.safetensors"]
    cache = LatentCache(broken, fingerprint)
    cache([0, 2])
    with pytest.raises(ValueError, match=r"latent of picture 3 is missing or torn in .*: run precompute_latents"):
        cache([0, 3])
    assert complete(images, broken, fingerprint) == 4
    assert contents(broken) == contents(whole)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_write_the_folder_that_one_writes(tmp_path, images, fingerprint, order):
    one, two = tmp_path / "one", tmp_path / "two"
    complete(images, one, fingerprint)
    shares = {index: complete(images, two, fingerprint, process_index=index, num_processes=2) for index in order}
    assert shares == {0: 4, 1: 3} and contents(two) == contents(one)


@pytest.mark.parametrize("keep", [0, 4, 60, -1], ids=["empty", "header size", "header", "last byte"])
def test_a_torn_shard_is_recognised_and_redone(tmp_path, images, fingerprint, keep):
    complete(images, tmp_path, fingerprint)
    whole = contents(tmp_path)
    torn = tmp_path / "000000003.safetensors"
    torn.write_bytes(torn.read_bytes()[:keep])
    cache = LatentCache(tmp_path, fingerprint)
    cache([2, 6])
    with pytest.raises(ValueError, match="latent of picture 4 is missing or torn"):
        cache([4])
    assert complete(images, tmp_path, fingerprint) == 3 and contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("name", "changes"),
    [("resolution", {"resolution": 32}), ("dtype", {"dtype": torch.bfloat16}), ("shard_size", {"shard_size": 2})],
)
def test_other_settings_are_other_latents(tmp_path, images, teacher, fingerprint, name, changes):
    complete(images, tmp_path, fingerprint)
    with pytest.raises(ValueError, match=f"holds other latents: {name} is [^;]*, not [^;]*. Choose another folder"):
        complete(images, tmp_path, describe(images, teacher, **changes), never)


def test_other_pictures_or_another_autoencoder_are_other_latents(tmp_path, images, teacher, fingerprint):
    complete(images, tmp_path / "latents", fingerprint)
    others = CaptionedImages(write_images(tmp_path / "images", CAPTIONS))
    assert describe(others, teacher) == fingerprint  # the same pictures in another folder
    assert describe(CaptionedImages(write_images(tmp_path / "renamed", CAPTIONS[::-1])), teacher) == fingerprint
    Image.new("RGB", (RESOLUTION, RESOLUTION)).save(tmp_path / "images" / "4.png")  # replaced in place
    replaced = describe(others, teacher)
    assert replaced == describe(CaptionedImages(tmp_path / "images"), teacher)
    fewer = describe(CaptionedImages(tmp_path / "renamed", max_images=6), teacher)
    config = teacher / "vae" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("0.41407", "0.5"))
    vae = describe(images, teacher)
    config.write_text(before)
    for name, other in (("pictures", replaced), ("pictures", fewer), ("vae", vae)):
        with pytest.raises(ValueError, match=f"holds other latents: {name} is [^;]*. Choose"):
            LatentCache(tmp_path / "latents", other)
