"""What the tests of the training script share: a tiny teacher and the flags of a short run on it."""

import pytest
from accelerate.state import AcceleratorState
from tiny import write_tiny_pipeline


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a dog\na violin\nthree little birds\n")
    return file


@pytest.fixture
def flags(teacher, prompts_file, tmp_path):
    """The flags of a short run, with changes."""

    def build(**changes):
        values = {
            "pretrained_model_name_or_path": teacher,
            "prompts_file": prompts_file,
            "output_dir": tmp_path / "run",
            "route_steps": 3,
            "max_train_steps": 2,
            "max_sequence_length": 16,
            "no-complex_human_instruction": True,
            "learning_rate": 1e-3,
            "tangent_warmup_steps": 2,
            "tangent_cooldown_start_step": 2,
            "tangent_cooldown_steps": 2,
            "report_to": "none",
            **changes,
        }
        arguments = []
        for name, value in values.items():
            if value is None or value is False:
                continue
            arguments.append(f"--{name}")
            if value is not True:
                arguments += [str(part) for part in (value if isinstance(value, list) else [value])]
        return arguments

    return build
