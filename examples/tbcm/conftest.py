"""What the tests of the training scripts share: a tiny teacher and the flags of a short run on it."""

import json

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import write_plain_pipeline, write_tiny_pipeline


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # tests elsewhere may have left one
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def plain_teacher(tmp_path_factory):
    return write_plain_pipeline(tmp_path_factory.mktemp("plain_teacher"))


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a dog\na violin\nthree little birds\n")
    return file


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of pictures, some with several captions, and its latents' cache, which every run shares."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    captions = (["a dog", "dog"], ["a violin"], ["three little birds", "birds"], ["an owl"], ["the sun"])
    lines = []
    for index, texts in enumerate(captions):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": texts}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield folder


def arguments(**values):
    """A command line of flags; None and False leave one out."""
    line = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        line.append(f"--{name}")
        if value is not True:
            line += [str(part) for part in (value if isinstance(value, list) else [value])]
    return line


@pytest.fixture
def shared_flags(teacher, tmp_path):
    return {
        "pretrained_model_name_or_path": teacher,
        "output_dir": tmp_path / "run",
        "max_train_steps": 2,
        "max_sequence_length": 16,
        "no-complex_human_instruction": True,
        "learning_rate": 1e-3,
        "report_to": "none",
        "debug": True,  # errors come as they are raised
    }


@pytest.fixture
def flags(shared_flags, prompts_file):
    """The flags of a short run of TBCM, with changes."""
    tbcm = {
        "prompts_file": prompts_file,
        "route_steps": 3,
        "tangent_warmup_steps": 2,
        "tangent_cooldown_start_step": 2,
        "tangent_cooldown_steps": 2,
    }
    return lambda **changes: arguments(**(shared_flags | tbcm | changes))


@pytest.fixture
def cdm_flags(shared_flags, prompts_file):
    """The flags of a short run of CDM, with changes."""
    cdm = {
        "prompts_file": prompts_file, "train_batch_size": 2, "max_rollout_steps": 4, "lr_warmup_steps": 0,
        "lr_scheduler": "constant", "critic_learning_rate": 1e-3, "max_train_steps": 4, "checkpointing_steps": 1,
        "logging_steps": 1,
    }  # fmt: skip
    return lambda **changes: arguments(**(shared_flags | cdm | changes))


@pytest.fixture
def picture_flags(shared_flags, pictures):
    """The flags of a short run on pictures, of any method that takes them, with changes."""
    data = {"train_data_dir": pictures, "latents_cache": pictures.with_name("latents"), "train_batch_size": 2}
    return lambda **changes: arguments(**(shared_flags | data | changes))
