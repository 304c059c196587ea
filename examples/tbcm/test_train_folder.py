"""What may be in a run's folder, and what the scripts do there: no file that we did not write changes."""

import re
import shutil
from hashlib import sha256
from unittest.mock import MagicMock

import pytest
from accelerate import Accelerator
from tiny import student_weights, tiny_transformer

from diffusers_tbcm.errors import Failure
from diffusers_tbcm.export import folders, hub
from diffusers_tbcm.export.folders import save_student_pipeline
from diffusers_tbcm.export.hub import push_pipeline_to_hub
from diffusers_tbcm.export.record import StudentDescription
from diffusers_tbcm.owned import LOCK, MARKER, OwnedFolder
from diffusers_tbcm.pipeline_folder import list_checkpoints
from diffusers_tbcm.scripts.train_tbcm_distill import main
from diffusers_tbcm.training import consistency
from diffusers_tbcm.training.run import Run


DESCRIPTION = StudentDescription("a dog", {"steps": 7})
STEPS = 2
OTHERWISE = {"learning_rate": 1e-4, "resume_with_changed": "learning_rate"}

# Where a student, a run or its records would be.
IN_THE_WAY = (
    "README.md", "model_index.json", "training.json", "training_config.json", "metrics.json", "metrics.jsonl",
    "pipeline.py", "grid.png", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler",
    "checkpoint-1/notes.txt", "checkpoint-2", "black_latent_64.safetensors",
)  # fmt: skip
STUDENT = IN_THE_WAY[:5] + IN_THE_WAY[6:11]
HARMLESS = (
    "notes.txt", "README.md.partial", "checkpoint-2.partial/model.safetensors", "student.partial/model.safetensors",
    "images/mine.png", "transformer/notes.txt", "validation/mine.png", "logs/mine", ".env", "abandoned/checkpoint-9/x",
    "checkpoint-best/model.safetensors", "latents/mine.safetensors", "vae/diffusion_pytorch_model.bin", "LICENSE",
)  # fmt: skip
BESIDE = ("run.partial/weights", "run.dry_run/weights", "run.dry_run.txt", "README.md")


def put(folder, *names):
    """The user's files, and what is to stay of them."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")
    return {folder / name: sha256(f"mine: {name}".encode()).hexdigest() for name in names}


def changed(theirs):
    """Those of the user's files that are not as they were."""
    return [
        str(path) for path, digest in theirs.items()
        if not path.is_file() or sha256(path.read_bytes()).hexdigest() != digest
    ]  # fmt: skip


def digests(folder):
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in (MARKER, LOCK)}


@pytest.fixture
def line(flags):
    return lambda **changes: flags(checkpointing_steps=1, logging_steps=1, **changes)


@pytest.fixture(scope="module")
def finished(teacher, prompts_file, tmp_path_factory):
    """A run that came to its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = {
        "pretrained_model_name_or_path": teacher, "prompts_file": prompts_file, "output_dir": folder,
        "max_train_steps": STEPS, "route_steps": 3, "tangent_warmup_steps": 2, "tangent_cooldown_start_step": 2,
        "tangent_cooldown_steps": 2, "max_sequence_length": 16, "learning_rate": 1e-3,
        "report_to": "none", "checkpointing_steps": 1, "logging_steps": 1, "validation_prompts": "a dog",
        "validation_steps": 1,
    }  # fmt: skip
    main(["--no-complex_human_instruction", *(str(part) for name, v in values.items() for part in (f"--{name}", v))])
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def act(action, line, teacher, run, monkeypatch):
    """What a script does in the folder; gives the error's words, None where it came to its end."""
    try:
        if action == "export":
            save_student_pipeline(tiny_transformer(guidance_embeds=True), teacher, run, DESCRIPTION)
        elif action == "push":
            monkeypatch.setattr(hub, "HfApi", MagicMock())
            monkeypatch.setattr(hub, "prepare_repo", lambda repo_id, **access: repo_id)
            push_pipeline_to_hub(run, "me/student", token="hf_x", license="mit", tag="one")
        else:
            changes = {
                "train": {},
                "resume": {"resume_from_checkpoint": "latest", "max_train_steps": STEPS + 1},
                "go back": {"resume_from_checkpoint": "checkpoint-1"},
                "dry run": {"dry_run": True},
                "LoRA": {"rank": 2, "merge_lora": True},
            }[action]
            main(line(**changes))
    except (ValueError, SystemExit) as error:
        return str(error)
    return None


ACTIONS = ("train", "resume", "go back", "dry run", "LoRA", "export", "push")
ON_A_RUN = ("resume", "go back", "export", "push")  # the others begin one


@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "push"])
@pytest.mark.parametrize("kind", ["one file", "many files"])
def test_a_folder_that_is_not_ours_is_left_alone(action, kind, line, teacher, tmp_path, monkeypatch):
    names = (*IN_THE_WAY, *HARMLESS) if kind == "many files" else ("notes.txt",)
    theirs = put(tmp_path / "run", *names) | put(tmp_path, *BESIDE)
    before = digests(tmp_path)
    assert act(action, line, teacher, tmp_path / "run", monkeypatch) is not None
    assert digests(tmp_path) == before and changed(theirs) == []


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_not_in_the_way_stays_and_the_work_is_done(action, line, teacher, tmp_path, monkeypatch, request):
    if action in ON_A_RUN:
        run = request.getfixturevalue("run")
    else:
        run = tmp_path / "run"
        OwnedFolder(run).claim()  # a run that ended before it wrote anything
    theirs = put(run, *HARMLESS) | put(tmp_path, *BESIDE)
    before = digests(run)
    assert act(action, line, teacher, run, monkeypatch) is None
    assert changed(theirs) == []
    assert not [*tmp_path.rglob("*.tbcm-partial")]
    if action in ("dry run", "push"):
        assert digests(run) == before
    else:
        assert student_weights(run)


@pytest.mark.parametrize("name", IN_THE_WAY)
@pytest.mark.parametrize("action", ["train", "LoRA", "resume", "export"])
def test_what_is_in_the_way_is_named_and_nothing_changes(action, name, line, teacher, run, tmp_path, monkeypatch):
    """In the folder of a run that ended before it wrote anything, or over what was written."""
    if action in ON_A_RUN:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
    else:
        shutil.rmtree(run)
        OwnedFolder(run).claim()
    refused = action not in ON_A_RUN or name in STUDENT
    theirs = put(run, name) | put(tmp_path, *BESIDE)
    before = digests(run)
    if refused:
        monkeypatch.setattr(folders.shutil, "copytree", lambda *args, **kwargs: pytest.fail("exported"))
        assert act(action, line, teacher, run, monkeypatch) is not None
        assert before.items() <= digests(run).items()
    elif action == "export":
        assert act(action, line, teacher, run, monkeypatch) is None
    assert changed(theirs) == []


@pytest.mark.parametrize("name", ["README.md", "metrics.json", "scheduler", "metrics.jsonl", "lora/README.md"])
def test_a_dry_run_finds_what_is_in_the_runs_way(name, line, tmp_path):
    run = tmp_path / "run"
    for folder in (run, run / "lora"):
        OwnedFolder(folder).claim()
    put(run, name)
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=rf"did not write, or what was changed since \({name.removeprefix('lora/')}"):
        main(line(dry_run=True, rank=2, merge_lora=True))
    assert digests(tmp_path) == before


def test_a_card_that_was_changed_is_not_lost(line, teacher, run, tmp_path, monkeypatch):
    card = run / "README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    before = digests(run)
    for action in ("resume", "export"):
        assert re.search(r"changed since \(README.md\): move it", act(action, line, teacher, run, monkeypatch))
    assert digests(run) == before
    card.rename(run / "mine.md")
    assert act("resume", line, teacher, run, monkeypatch) is None
    assert "By hand." in (run / "mine.md").read_text() and "By hand." not in card.read_text()


@pytest.mark.parametrize("request_", ["", " "])
def test_resuming_from_nothing_is_refused_and_changes_nothing(request_, line, run, capsys):
    before = digests(run)
    with pytest.raises(SystemExit):
        main(line(resume_from_checkpoint=request_, seed=9))
    assert "--resume_from_checkpoint is " in capsys.readouterr().err and digests(run) == before


def test_latest_without_checkpoints_is_refused_and_changes_nothing(line, run, tmp_path, capsys):
    for checkpoint in list_checkpoints(run):
        shutil.rmtree(checkpoint)
    before = digests(run)
    for folder in (run, tmp_path / "new"):
        with pytest.raises(SystemExit):
            main(line(output_dir=folder, resume_from_checkpoint="latest", seed=9))
        assert "holds no checkpoint: leave it out to start" in capsys.readouterr().err
    assert digests(run) == before and not (tmp_path / "new").exists()


def test_another_runs_checkpoint_does_not_replace_a_student(line, finished, run, tmp_path, capsys):
    before = digests(run)
    with pytest.raises(SystemExit):
        main(line(resume_from_checkpoint=finished / "checkpoint-1"))
    assert "holds another run than that of --resume_from_checkpoint" in capsys.readouterr().err
    assert digests(run) == before
    main(line(output_dir=tmp_path / "new", resume_from_checkpoint=finished / "checkpoint-1"))
    assert student_weights(tmp_path / "new")


def test_a_lora_is_a_finished_student_too(line, tmp_path, capsys):
    main(line(rank=2))
    for checkpoint in list_checkpoints(tmp_path / "run"):
        shutil.rmtree(checkpoint)
    before = digests(tmp_path)
    with pytest.raises(SystemExit):
        main(line(rank=2))
    assert "holds another run" in capsys.readouterr().err and digests(tmp_path) == before


@pytest.mark.parametrize("output_dir", ["", " ", ".", "./", "file", "file/run", "/proc/nobody/run"])
def test_a_place_that_is_no_folder_of_a_run_is_refused(output_dir, line, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "file").write_text("mine")
    for dry_run in (False, True):
        with pytest.raises((SystemExit, ValueError)) as ended:
            main(line(output_dir=output_dir, dry_run=dry_run))
        words = str(ended.value) + capsys.readouterr().err
        assert re.search("(--|`)output_dir", words), words
    assert digests(tmp_path) == {"here/file": sha256(b"mine").hexdigest()}


@pytest.mark.parametrize("place", ["", "transformer", "students/one"])
def test_a_folder_in_the_teachers_is_refused(place, line, teacher, tmp_path):
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    OwnedFolder(copy)._note({})  # as of a student that is distilled further
    before = digests(copy)
    with pytest.raises((SystemExit, ValueError)):
        main(line(pretrained_model_name_or_path=copy, output_dir=copy / place))
    assert digests(copy) == before


def test_a_folder_around_the_teachers_is_refused(line, teacher, tmp_path):
    OwnedFolder(tmp_path / "run").claim()
    copy = shutil.copytree(teacher, tmp_path / "run" / "transformer")
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=r"`output_dir` .* lie in one another: choose another folder"):
        main(line(pretrained_model_name_or_path=copy))
    assert digests(tmp_path) == before


def test_a_run_that_goes_back_sets_the_later_checkpoints_aside(line, run):
    old = digests(run)
    main(line(resume_from_checkpoint="checkpoint-1", max_train_steps=2, **OTHERWISE))
    new = digests(run)
    for name in old:
        if name.startswith("checkpoint-2/") or name == "validation/step-2.png":
            assert new[f"abandoned/{name}"] == old[name]
    assert new["checkpoint-2/model.safetensors"] != old["checkpoint-2/model.safetensors"]
    assert all('"step": 2,' in text for text in (run / "abandoned" / "metrics.jsonl").read_text().splitlines())
    main(line(resume_from_checkpoint="latest", max_train_steps=3, **OTHERWISE))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [text.split(",")[0] for text in lines] == [f'{{"step": {step}' for step in (1, 2, 3)]


def test_a_run_can_go_back_to_what_it_has_left(line, run):
    main(line(resume_from_checkpoint="checkpoint-1", max_train_steps=2, **OTHERWISE))
    left, other = digests(run / "abandoned" / "checkpoint-2"), digests(run / "checkpoint-2")
    main(line(resume_from_checkpoint="abandoned/checkpoint-2", max_train_steps=3))
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-3"]
    assert digests(run / "abandoned" / "checkpoint-2") == left
    assert digests(run / "abandoned" / "checkpoint-2-2") == other


def test_nothing_is_set_aside_that_holds_the_users_files(line, run):
    theirs = put(run, "checkpoint-2/notes.txt")
    with pytest.raises(ValueError, match=r"checkpoint-2' is to be set aside, but holds notes.txt"):
        main(line(resume_from_checkpoint="checkpoint-1"))
    assert changed(theirs) == []
    main(line(resume_from_checkpoint="latest", max_train_steps=4, checkpoints_total_limit=1))
    assert changed(theirs) == [] and [path.name for path in (run / "checkpoint-2").iterdir()] == ["notes.txt"]


def test_a_dry_run_says_nothing_of_a_deleted_folder_and_takes_no_notice_of_a_stale_one(line, tmp_path, capsys):
    stale = tmp_path / ".run.dry_run.tbcm-partial" / "run"
    stale.mkdir(parents=True)
    (stale / "model_index.json").write_text("{}")
    theirs = put(tmp_path, *BESIDE)
    main(line(dry_run=True))
    printed = capsys.readouterr().out
    assert "a folder that is now deleted" in printed and "Done." not in printed and ".dry_run" not in printed
    assert changed(theirs) == [] and {path for path in tmp_path.rglob("*") if path.is_file()} == {*theirs}


def test_a_disk_that_cannot_rename_folders_is_found_before_training(line, tmp_path, monkeypatch):
    rename = type(tmp_path).replace

    def refuse(path, target):
        if path.is_dir():
            raise OSError("Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", refuse)
    for dry_run in (False, True):
        with pytest.raises(ValueError, match="takes no student, as files cannot be renamed in it"):
            main(line(dry_run=dry_run))
    assert not [*tmp_path.rglob("*.tbcm-partial")]


def test_an_export_between_steps_that_fails_costs_a_warning(line, tmp_path, monkeypatch, caplog):
    save, failures = (
        consistency.save_student_pipeline,
        [OSError(28, "No space left on device"), ValueError("README.md")],
    )

    def fail_at_first(*args, **kwargs):
        if failures:
            raise failures.pop(0)
        return save(*args, **kwargs)

    monkeypatch.setattr(consistency, "save_student_pipeline", fail_at_first)
    monkeypatch.setattr(Run, "push_due", property(lambda run: run.step < 3))
    main(line(max_train_steps=3))
    assert "The student of step 1 was not saved, training goes on: [Errno 28]" in caplog.text
    assert "The student of step 2 was not saved, training goes on: README.md" in caplog.text
    assert student_weights(tmp_path / "run")


def test_a_tracker_that_cannot_begin_or_end_costs_a_warning(line, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "init_trackers", full)
    monkeypatch.setattr(Accelerator, "end_training", full)
    main(line(report_to="tensorboard"))
    assert "`report_to` tensorboard failed and is left out" in caplog.text and "could not be closed" in caplog.text
    assert student_weights(tmp_path / "run")


def test_a_full_disk_at_validation_costs_a_warning_and_at_the_export_no_earlier_student(
    line, run, monkeypatch, caplog
):
    before = digests(run)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(Failure, match=r"could not be saved: .*No space left.*resume_from_checkpoint` latest goes on"):
        main(
            line(resume_from_checkpoint="latest", max_train_steps=3, validation_prompts=["a dog"], validation_steps=1)
        )
    assert "The validation pictures of step 3 could not be written" in caplog.text
    after = digests(run)
    assert all(after[name] == digest for name, digest in before.items() if name != "metrics.jsonl")
    assert not [*run.glob("*.tbcm-partial")]
