import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_sana_pipeline, tiny_tbcm_pipeline
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import GemmaTokenizerFast

from diffusers_tbcm import TBCMScheduler
from diffusers_tbcm.evaluation.picture_folder import PictureFolder, pipeline_digests
from diffusers_tbcm.files import beside


PROMPTS = ["a dog", "a violin", "three little birds"]
OPTIONS = {
    "num_inference_steps": 1,
    "seed": 5,
    "batch_size": 4,
    "progress": False,
    "complex_human_instruction": None,
    "max_sequence_length": 16,
}


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(folder):
    return np.stack([np.asarray(picture) for picture in folder]).astype(int)


@pytest.fixture(scope="module")
def drawn(pipeline, tmp_path_factory):
    folder = PictureFolder(tmp_path_factory.mktemp("pictures"), PROMPTS, 2, {"seed": 5})
    folder.draw(pipeline, folder.missing(), **OPTIONS)
    return folder


def test_every_picture_has_its_place_and_noise_of_its_own(drawn):
    assert len(drawn) == 6 and drawn.missing() == []
    assert {path.name for path in drawn.folder.glob("*.png")} == {
        f"00000{p}-0{i}.png" for p in range(3) for i in (0, 1)
    }
    assert not [*drawn.folder.glob("*.partial")]
    flat = pixels(drawn).reshape(6, -1)
    assert len(np.unique(flat, axis=0)) == 6
    assert np.array_equal(pixels(drawn[2:4]), pixels(drawn)[2:4])
    with pytest.raises(IndexError):
        drawn[6]


def test_a_run_that_was_killed_before_its_first_picture_goes_on(tmp_path):
    beside(tmp_path / "settings.json").write_text('{"seed"')
    assert len(PictureFolder(tmp_path, PROMPTS, 1, {"seed": 0}).missing()) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_only_what_is_missing_is_drawn_and_whatever_the_batch_the_same(drawn, pipeline, tmp_path):
    again = PictureFolder(tmp_path, PROMPTS, 2, {"seed": 5})
    again.draw(pipeline, [4, 1], **OPTIONS | {"batch_size": 1})
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert again.missing() == [0, 2, 3, 5]
    resumed = PictureFolder(tmp_path, PROMPTS, 2, {"seed": 5})
    resumed.draw(pipeline, resumed.missing(), **OPTIONS | {"batch_size": 3})
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}.items()
    assert np.abs(pixels(resumed) - pixels(drawn)).max() <= 1  # kernels round differently with the batch size


def test_more_pictures_a_prompt_keep_those_that_are_there(drawn, pipeline):
    more = PictureFolder(drawn.folder, PROMPTS, 3, {"seed": 5})
    assert more.missing() == [2, 5, 8]


@pytest.mark.filterwarnings("ignore::diffusers_tbcm.finite.NotFiniteWarning")
def test_a_picture_that_is_none_is_not_kept(tmp_path):
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[0] = float("nan")
    folder = PictureFolder(tmp_path, PROMPTS, 1, {})
    with pytest.raises(ValueError, match="The picture of 'a dog' at 1 step is not finite"):
        folder.draw(pipeline, folder.missing(), **OPTIONS)
    assert folder.missing() == [0, 1, 2] and not [*tmp_path.glob("*.png*")]


def test_a_torn_file_counts_as_missing(pipeline, tmp_path, monkeypatch):
    folder = PictureFolder(tmp_path, PROMPTS, 1, {})

    def full_disk(self, *args, **kwargs):
        args[0].write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        folder.draw(pipeline, [0], **OPTIONS)
    assert folder.missing() == [0, 1, 2]


def test_pictures_that_were_damaged_since_are_named_and_drawn_again(drawn, pipeline, tmp_path, caplog):
    shutil.copytree(drawn.folder, tmp_path, dirs_exist_ok=True)
    folder = PictureFolder(tmp_path, PROMPTS, 2, {"seed": 5})
    torn, empty, flipped, other = (folder.path(index) for index in (0, 2, 3, 5))
    torn.write_bytes(torn.read_bytes()[:-20])
    empty.write_bytes(b"")
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    Image.open(other).save(other, format="JPEG")
    with pytest.raises(ValueError, match=f"picture '{empty}' cannot be read"):
        folder[2]
    assert folder.missing() == [0, 2, 3, 5]
    assert f"4 pictures of '{tmp_path}' are torn and drawn again: {torn.name}" in caplog.text
    folder.draw(pipeline, folder.missing(), **OPTIONS)
    assert folder.missing() == [] and np.abs(pixels(folder) - pixels(drawn)).max() <= 1


def test_no_picture_is_drawn_with_a_tokenizer_that_reads_nothing(tmp_path):
    pipeline = tiny_sana_pipeline()
    pipeline.tokenizer = GemmaTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab={"<unk>": 0}, merges=[], unk_token="<unk>"))
    )
    with pytest.raises(ValueError, match="`tokenizer` reads every prompt alike"):
        PictureFolder(tmp_path, PROMPTS, 1, {}).draw(pipeline, [0], **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"seed": 6, "steps": 1}}, "seed is 5 there and 6 here"),
        ({"settings": {"seed": 5}}, "steps is 1 there and None here"),
        ({"prompts": ["a dog", "a cat"]}, "prompts is '[0-9a-f]{16}' there"),
        ({"prompts": ["a dog"]}, "prompts is "),
    ],
)
def test_pictures_of_another_run_are_refused(changes, message, tmp_path):
    given = {"prompts": ["a dog", "a violin"], "settings": {"seed": 5, "steps": 1}}
    folder = PictureFolder(tmp_path, pictures_per_prompt=1, **given)
    Image.new("RGB", (8, 8)).save(folder.path(0))
    PictureFolder(tmp_path, pictures_per_prompt=1, **given)
    with pytest.raises(ValueError, match=f"holds pictures of another run: {message}"):
        PictureFolder(tmp_path, pictures_per_prompt=1, **given | changes)


def test_settings_that_no_picture_came_of_bind_nobody(drawn, pipeline, tmp_path):
    wrong = PictureFolder(tmp_path, PROMPTS, 2, {"seed": -1})
    with pytest.raises(ValueError, match="negative"):
        wrong.draw(pipeline, wrong.missing(), **OPTIONS | {"seed": -1})
    right = PictureFolder(tmp_path, PROMPTS, 2, {"seed": 5})
    right.draw(pipeline, right.missing(), **OPTIONS)
    assert np.array_equal(pixels(right), pixels(drawn))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds files, and no settings.json that says of what"):
        PictureFolder(tmp_path, PROMPTS, 2, {"seed": 5})


@pytest.mark.parametrize("name", ["000000-00.png", "notes.txt"])
def test_a_folder_of_other_files_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds files, and no settings.json that says of what"):
        PictureFolder(tmp_path, PROMPTS, 1, {})
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_pipelines_digests_change_with_its_weights_and_scheduler_alone(tmp_path):
    pipeline = tiny_sana_pipeline()
    digests = pipeline_digests(pipeline)
    assert digests.keys() == {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    pipeline.save_pretrained(tmp_path)
    assert pipeline_digests(type(pipeline).from_pretrained(tmp_path)) == digests
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[0] += 1e-3
    changed = pipeline_digests(pipeline)
    assert {name for name in digests if digests[name] != changed[name]} == {"transformer"}
    pipeline.tokenizer(["a dog"], padding="max_length", max_length=7, truncation=True)
    assert pipeline_digests(pipeline) == changed
    pipeline.tokenizer.add_tokens(["dog"])
    assert pipeline_digests(pipeline)["tokenizer"] != digests["tokenizer"]
    pipeline.scheduler = TBCMScheduler()
    assert pipeline_digests(pipeline)["scheduler"] != digests["scheduler"]


def test_the_digest_of_a_sampler_with_fresh_noise_is_that_of_earlier_versions():
    pipeline = tiny_tbcm_pipeline()
    assert pipeline_digests(pipeline)["scheduler"] == "d078254eeae0086e"  # in folders from before the choice
    pipeline.scheduler = TBCMScheduler(stochastic_sampling=False)
    assert pipeline_digests(pipeline)["scheduler"] != "d078254eeae0086e"
