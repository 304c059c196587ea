"""Settings of runs and the flags that scripts make of them."""

import dataclasses
from dataclasses import dataclass

import pytest

from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.training.settings import (
    DistillationSettings,
    PictureSettings,
    RowSettings,
    RunSettings,
    check_not_negative,
    check_positive,
    parse_settings,
    setting,
)


@dataclass(kw_only=True)
class ScriptSettings(RowSettings):
    """a script's own"""

    blocks: list[int] | None = setting(None, "numbers")
    scheme: str = setting("plain", "a choice", choices=("plain", "other"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks == []:
            raise ValueError("`blocks` is empty, as is `nothing_of_ours`")


def parse(*more, tmp_path):
    needed = ["--pretrained_model_name_or_path", "teacher", "--output_dir", str(tmp_path / "run")]
    return parse_settings(ScriptSettings, [*needed, *map(str, more)], description="A script.")


def test_defaults_of_the_command_line_are_those_of_the_class(tmp_path):
    expected = ScriptSettings(pretrained_model_name_or_path="teacher", output_dir=str(tmp_path / "run"))
    assert parse(tmp_path=tmp_path) == expected
    assert expected.teacher_batch_size == expected.train_batch_size == 1
    assert expected.guidance_scales == [4.0, 4.5, 5.0] and expected.complex_human_instruction


def test_every_kind_of_value_is_read(tmp_path):
    flags = ["--blocks", 1, 2, "--scheme", "other", "--guidance_scales", 1, 2.5, "--use_ema", "--rank", 4]
    found = parse(*flags, "--no-complex_human_instruction", "--learning_rate", "1e-4", tmp_path=tmp_path)
    assert found.blocks == [1, 2] and found.scheme == "other" and found.guidance_scales == [1.0, 2.5]
    assert found.use_ema and found.rank == 4 and found.learning_rate == 1e-4
    assert not found.complex_human_instruction and found.mixed_precision is None
    pushed = parse("--push_to_hub", "--hub_private_repo", tmp_path=tmp_path)
    assert pushed.push_to_hub and pushed.hub_private_repo is True


def test_two_instances_share_no_list(tmp_path):
    first, second = (RowSettings(output_dir=str(tmp_path), pretrained_model_name_or_path="teacher") for _ in range(2))
    first.guidance_scales.append(6.0)
    assert second.guidance_scales == [4.0, 4.5, 5.0]


@dataclass(kw_only=True)
class OtherDefaults(ScriptSettings):
    """another script's own"""

    weight_decay: float = setting(1e-4, "stronger here")


def test_another_default_replaces_that_of_the_base(tmp_path, capsys):
    needed = ["--pretrained_model_name_or_path", "teacher", "--output_dir", str(tmp_path / "run")]
    assert parse_settings(OtherDefaults, needed).weight_decay == 1e-4
    assert parse_settings(OtherDefaults, [*needed, "--weight_decay", "0.5"]).weight_decay == 0.5
    with pytest.raises(SystemExit):
        parse_settings(OtherDefaults, ["--help"])
    printed = capsys.readouterr().out
    assert "stronger here (default: 0.0001)" in printed and "of the optimiser (default" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", 0], "--rank is 0: it has to be positive"),
        (["--scheme", "third"], "--scheme: invalid choice: 'third'"),
        (["--lora_alpha", 3], "--lora_alpha needs --rank"),
        (["--unknown", 3], "unrecognized arguments: --unknown 3"),
        (["--replay_steps", 2], "--replay_steps is 2, which trains"),
        (["--learning_rate", "nothing"], "--learning_rate"),
    ],
)
def test_what_does_not_fit_ends_with_the_flags_name(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*flags, tmp_path=tmp_path)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_only_names_of_settings_become_flags(tmp_path, capsys, monkeypatch):
    def refuse(self):
        raise ValueError("`blocks` is bad, `final_ratio` too")

    monkeypatch.setattr(ScriptSettings, "__post_init__", refuse)
    with pytest.raises(SystemExit):
        parse(tmp_path=tmp_path)
    assert "--blocks is bad, `final_ratio` too" in capsys.readouterr().err


def test_without_a_command_line_the_argument_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^`max_train_steps` is 0: it has to be positive$"):
        RunSettings(output_dir=str(tmp_path), max_train_steps=0)
    with pytest.raises(ValueError, match=r"^`seed` is -1: it must not be negative$"):
        RunSettings(output_dir=str(tmp_path), seed=-1)
    check_not_negative(RunSettings(output_dir=str(tmp_path)), "seed")
    check_positive(RunSettings(output_dir=str(tmp_path)), "checkpoints_total_limit")  # None passes


def test_help_shows_groups_defaults_and_the_descriptions_lines(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_settings(ScriptSettings, ["--help"], description="First line.\n    second, indented")
    shown = capsys.readouterr().out
    assert "First line.\n    second, indented\n" in shown
    assert "a script's own:" in shown and "teacher and student:" in shown
    assert "a choice (default: plain)" in shown


def test_every_setting_says_what_it_does_and_its_default(capsys):
    for kind in (ScriptSettings, PictureSettings):
        assert all(field.metadata["help"] for field in dataclasses.fields(kind))
        with pytest.raises(SystemExit):
            parse_settings(kind, ["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(kind):
            if field.default not in (None, dataclasses.MISSING):
                says = " ".join(field.metadata["help"].split())
                assert f"{says} (default: {field.default})" in shown, field.name
        assert "(default: None)" not in shown


def test_help_says_of_a_switch_what_it_switches_off(capsys):
    with pytest.raises(SystemExit):
        parse_settings(PictureSettings, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--no-stochastic_sampling do not: take fresh noise between the student's steps" in shown


@pytest.mark.parametrize("kind", [RunSettings, RowSettings, DistillationSettings, PictureSettings])
def test_every_setting_has_a_type_that_a_command_line_can_give(kind):
    with pytest.raises(SystemExit) as ended:
        parse_settings(kind, ["--help"])
    assert ended.value.code == 0
    assert all(field.kw_only for field in dataclasses.fields(kind))


def test_a_folder_with_another_run_is_refused(tmp_path):
    OwnedFolder(tmp_path).claim()
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match=r"`output_dir` .* holds another run"):
        RunSettings(output_dir=str(tmp_path))
    RunSettings(output_dir=str(tmp_path), resume_from_checkpoint="latest")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir` .* is a file"):
        RunSettings(output_dir=str(tmp_path / "file"))


@pytest.mark.parametrize("variable", ["ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"])
def test_a_token_on_a_launchers_command_line_is_refused(variable, tmp_path, monkeypatch, capsys):
    flags = ("--push_to_hub", "--hub_token", "hf_0123456789abcdef")
    assert parse(*flags, tmp_path=tmp_path).hub_token == "hf_0123456789abcdef"
    monkeypatch.setenv(variable, "0")
    with pytest.raises(SystemExit, match="2"):
        parse(*flags, tmp_path=tmp_path)
    message = capsys.readouterr().err
    assert "--hub_token is on the launcher's command line" in message and "set HF_TOKEN" in message
    assert "0123456789" not in message


@pytest.mark.parametrize("tracker", ["wandb", "all", "comet_ml", "clearml"])
def test_a_token_goes_to_no_tracker_that_sends_command_lines(tracker, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--push_to_hub", "--hub_token", "hf_x", "--report_to", tracker, tmp_path=tmp_path)
    assert f"--hub_token could be sent to {tracker} with the command line" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--hubtoken", "hf_0123456789abcdef"], ["--token=secretvalue"], ["--use_ema", "hf_0123456789abcdef"]]
)
def test_no_message_and_no_settings_printed_show_a_token(flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*flags, tmp_path=tmp_path)
    printed = capsys.readouterr().err
    assert "***" in printed and "secretvalue" not in printed and "0123456789" not in printed
    settings = parse("--push_to_hub", "--hub_token", "hf_0123456789abcdef", tmp_path=tmp_path)
    assert "0123456789" not in repr(settings)


@pytest.mark.parametrize("flags", [
    ["--gradient_accumulation_steps", "1" + 30 * "0"], ["--max_train_steps", "9007199254740993"],
    ["--validation_prompts", "a dog", "half a \ud800"], ["--validation_prompts", "a \0"],
    ["--hub_model_id", "\udcff", "--push_to_hub"],
])  # fmt: skip
def test_what_is_no_count_or_no_text_is_refused_by_name(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_settings(RunSettings, ["--output_dir", str(tmp_path / "run"), *flags])
    assert f"error: {flags[0]} is " in capsys.readouterr().err


def test_a_runs_folder_among_the_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`output_dir` .* lies in `train_data_dir`, whose folders are all read"):
        PictureSettings(
            pretrained_model_name_or_path="x", train_data_dir=str(tmp_path), output_dir=str(tmp_path / "a" / "run")
        )


def test_a_machine_says_once_what_does_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        parse_settings(RunSettings, ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "0"])
    assert ended.value.code == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["latents_cache", "precompute_embeddings"])
def test_a_cache_is_no_runs_folder(name, tmp_path):
    for cache in (tmp_path / "run", tmp_path / "other" / ".." / "run"):
        with pytest.raises(ValueError, match=f"`{name}` is .*, which is `output_dir`: name a folder of its own"):
            PictureSettings(
                pretrained_model_name_or_path="x", dataset_name="y", output_dir=f"{tmp_path}/run", **{name: str(cache)}
            )
