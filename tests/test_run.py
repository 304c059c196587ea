"""What a run promises whatever the algorithm, on a toy of two models that train in turn."""

import fcntl
import gc
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import toy_run
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from runs import largest_relative_difference, metrics
from runs import launch as launch_processes
from safetensors.torch import load_file, save_file
from toy_run import Net, ToySettings, record_points, start, train

from diffusers_tbcm.owned import LOCK, OwnedFolder
from diffusers_tbcm.pipeline_folder import list_checkpoints
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.run import Run


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def settings(tmp_path):
    def build(name="run", **changes):
        values = {"max_train_steps": 8, "train_batch_size": 4, "report_to": "none", "logging_steps": 1, **changes}
        return ToySettings(output_dir=str(tmp_path / name), **values)

    return build


def run_toy(settings):
    run = train(settings, StopRequest())
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


def weights(folder, step):
    """The weights of both models in a checkpoint; the student is the first."""
    checkpoint = Path(folder) / f"checkpoint-{step}"
    return [load_file(checkpoint / name) for name in ("model.safetensors", "model_1.safetensors")]


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_critic_steps_every_time_and_a_student_every_second_time(settings, tmp_path):
    run = run_toy(settings(max_train_steps=4, checkpointing_steps=1, lr_scheduler="linear", use_ema=True))
    assert run.step == 4
    students, critics = zip(*(weights(tmp_path / "run", step) for step in (1, 2, 3, 4)), strict=True)
    assert [same(a, b) for a, b in pairwise(students)] == [False, True, False]
    assert [same(a, b) for a, b in pairwise(critics)] == [False] * 3
    checkpoint = tmp_path / "run" / "checkpoint-4"
    steps = [torch.load(checkpoint / name)["state"][0]["step"] for name in ("optimizer.bin", "optimizer_1.bin")]
    assert steps == [2, 4]
    lines = metrics(tmp_path / "run")
    assert [line["lr"] for line in lines] == [1e-2, 5e-3, 5e-3, 0.0]  # the schedule is over the student's updates
    assert [line["critic_lr"] for line in lines] == [2e-2] * 4
    assert ["loss" in line for line in lines] == [False, True, True, True] and "critic_loss" in lines[0]
    assert [("grad_norm" in line, "critic_grad_norm" in line) for line in lines] == [(False, True), (True, True)] * 2


@pytest.mark.parametrize("stop_at", [3, 4], ids=["after a critic's step", "after a student's step"])
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_one_bit_for_bit(settings, tmp_path, stop_at):
    options = {"use_ema": True, "lr_scheduler": "cosine", "gradient_accumulation_steps": 2, "dropped": 0.3}
    run_toy(settings("straight", **options))
    run_toy(settings("broken", checkpointing_steps=stop_at, **options))
    (tmp_path / "broken" / "checkpoint-8").rename(tmp_path / "aside")
    if stop_at == 3:
        (tmp_path / "broken" / "checkpoint-6").rename(tmp_path / "later")
    resumed = run_toy(settings("broken", resume_from_checkpoint="latest", checkpointing_steps=8, **options))
    assert resumed.resumed.name == f"checkpoint-{stop_at}"
    for actual, expected in zip(weights(tmp_path / "broken", 8), weights(tmp_path / "straight", 8), strict=True):
        assert same(actual, expected)
    for name in ("optimizer.bin", "optimizer_1.bin"):
        states = [torch.load(tmp_path / folder / "checkpoint-8" / name)["state"] for folder in ("broken", "straight")]
        assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[1])
    averages = [load_file(tmp_path / folder / "checkpoint-8" / "ema.safetensors") for folder in ("broken", "straight")]
    assert same(*averages)


def test_a_signal_ends_the_run_after_a_checkpoint_and_the_rest_follows(settings, tmp_path, monkeypatch):
    run_toy(settings("straight", checkpointing_steps=8))
    stop = StopRequest()
    record = toy_run.record_points

    def interrupt(settings, run, draws):
        stop.received |= run.step == 2
        return record(settings, run, draws)

    with monkeypatch.context() as patch:
        patch.setattr(toy_run, "record_points", interrupt)
        run = train(settings(), stop)
    assert run.stopped and run.step == 3
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    AcceleratorState._reset_state(reset_partial_state=True)
    run_toy(settings(resume_from_checkpoint="latest"))
    assert all(map(same, weights(tmp_path / "run", 8), weights(tmp_path / "straight", 8)))


def test_a_signal_in_the_last_step_leaves_nothing_to_stop(settings):
    stop = StopRequest()
    stop.received = True
    run = train(settings(max_train_steps=1), stop)
    assert run.step == 1 and not run.stopped


def test_a_step_that_is_not_finite_is_skipped_by_all_its_models(settings, tmp_path, monkeypatch, caplog):
    def poison(settings, run, draws):
        recording, keep = record_points(settings, run, draws)
        if run.step == 3:
            recording.latents.fill_(float("nan"))
        return recording, keep

    monkeypatch.setattr(toy_run, "record_points", poison)
    run_toy(settings(checkpointing_steps=1))
    third, fourth, fifth = (weights(tmp_path / "run", step) for step in (3, 4, 5))
    assert all(map(same, fourth, third)) and not same(fifth[1], fourth[1])
    assert "Step 4: gradient norm nan" in caplog.text
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_the_mean_over_what_is_kept_in_all_micro_steps(settings, tmp_path, accumulation):
    def norm(name, batch_size, keep, accumulation=1):
        """The gradient's norm of one step whose loss is that of the kept points alone."""
        toy = settings(name, max_train_steps=1, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        run = Run(toy, StopRequest(), script=__file__)
        run.open_folder()
        critic = run.add("critic", Net())

        def record(draws):
            recording, _ = record_points(toy, run, draws)
            return recording, torch.tensor([draw in keep for draw in draws])

        for batch in run.batches(record, rows_per_prompt=1, num_prompts=16, drops=True):
            for rows in batch:
                run.backward(critic(rows.latents).square().mean(), critic)
            run.update(critic)
        AcceleratorState._reset_state(reset_partial_state=True)
        return metrics(tmp_path / name)[-1]["grad_norm"]

    assert norm("whole", 1, {0}) == pytest.approx(norm("dropped", 4 // accumulation, {0}, accumulation), rel=1e-5)


def test_the_average_follows_the_weights_and_is_what_weights_gives(settings, tmp_path):
    run, student, critic = start(settings(max_train_steps=4, use_ema=True, ema_decay=0.5), StopRequest())
    seen = []
    for batch in run.batches(lambda draws: record_points(run.settings, run, draws), rows_per_prompt=1, num_prompts=16):
        for rows in batch:
            for model in (student, critic):
                if run.due(model):
                    run.backward(model(rows.latents).square().mean(), model)
        run.update(*(model for model in (student, critic) if run.due(model)))
        seen.append({name: weight.clone() for name, weight in student.state_dict().items()})
    _, first, _, last = seen  # the student was updated twice; the first average is its weights
    decay = EMAModel(student.parameters(), decay=0.5).get_decay(2)
    assert 0 < decay < 1 and same(run.weights(critic), critic.state_dict())
    for name, weight in run.weights(student).items():
        torch.testing.assert_close(weight, decay * first[name] + (1 - decay) * last[name])
        assert not torch.equal(first[name], last[name])


def next_rows(run, settings):
    batch = next(run.batches(lambda draws: record_points(settings, run, draws), rows_per_prompt=1, num_prompts=16))
    micro_steps = iter(batch)
    return micro_steps, next(micro_steps)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_gone_through_again_has_the_same_rows_and_counts_them_once(settings, tmp_path, accumulation):
    toy = settings(max_train_steps=2, gradient_accumulation_steps=accumulation)
    run, student, critic = start(toy, StopRequest())
    batches = run.batches(
        lambda draws: record_points(toy, run, draws), rows_per_prompt=1, num_prompts=16, drops=True, ahead=0
    )
    for number, batch in enumerate(batches):
        passes = []
        for model in (critic, student) if run.due(student) else (critic,):
            passes.append([])
            for rows in batch:
                passes[-1].append((rows.latents, run.generators(1, stream=2)[0].initial_seed()))
                run.backward(model(rows.latents).square().mean(), model)
            run.update(model)
            assert run.due(student) == (number == 1)  # also after the critic's update, which may end the step
    first, again = passes
    assert len(first) == accumulation
    for (points, seed), (points_again, seed_again) in zip(first, again, strict=True):
        assert points is points_again and seed == seed_again
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 0]


def test_what_belongs_to_an_update_is_in_its_checkpoint_and_left_out_with_it(settings, tmp_path):
    toy = settings(max_train_steps=2, checkpointing_steps=1)
    run = Run(toy, StopRequest(), script=__file__)
    run.open_folder()
    critic = run.add("critic", Net())
    called = []

    def to_zero():
        called.append(run.step)
        critic[0].bias.data.zero_()

    batches = run.batches(lambda draws: record_points(toy, run, draws), rows_per_prompt=1, num_prompts=16)
    for batch in batches:
        for rows in batch:
            factor = 1.0 if run.step == 0 else float("nan")
            run.backward(factor * critic(rows.latents).square().mean(), critic)
        run.update(critic, then=to_zero)
    assert called == [0]  # and not in the step that was not finite
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert torch.equal(saved["0.bias"], torch.zeros(16)) and saved["2.bias"].any()


def test_verbs_in_the_wrong_order_say_so(settings):
    toy = settings()
    run, student, critic = start(toy, StopRequest())
    with pytest.raises(ValueError, match="a Net is none of the run's models \\(student, critic\\)"):
        run.backward(torch.zeros(()), Net())
    with pytest.raises(RuntimeError, match="`backward` is called outside the micro-steps"):
        run.backward(torch.zeros(()), critic)
    with pytest.raises(RuntimeError, match="`update` of 'critic' comes before the `backward`"):
        run.update(critic)

    with pytest.raises(RuntimeError, match="training has not begun: go through `batches` first"):
        run.generators(2, stream=2)

    batch, rows = next_rows(run, toy)
    with pytest.raises(RuntimeError, match="model 'other' is added after `batches` has begun"):
        run.add("other", Net())
    with pytest.raises(ValueError, match="model 'student' is not due in step 0"):
        run.backward(student(rows.latents).mean(), student)
    run.backward(critic(rows.latents).mean(), critic)
    with pytest.raises(RuntimeError, match="`update` of 'critic' comes before the `backward` of all its micro-steps"):
        run.update(critic)  # the micro-steps are not over
    assert list(batch) == []
    run.update(critic)
    with pytest.raises(RuntimeError, match="`update` of 'critic' comes before the `backward`"):
        run.update(critic)


def test_a_step_without_update_and_a_run_without_models_say_so(settings):
    toy = settings()
    run = Run(toy, StopRequest(), script=__file__)
    with pytest.raises(RuntimeError, match="`add` a model before `batches`"):
        next_rows(run, toy)
    critic = run.add("critic", Net())
    run.open_folder()
    batches = run.batches(lambda draws: record_points(toy, run, draws), rows_per_prompt=1, num_prompts=16)
    for rows in next(batches):
        run.backward(critic(rows.latents).mean(), critic)
    with pytest.raises(RuntimeError, match="step 0 ended without `update` of critic"):
        next(batches)


def test_nothing_is_recorded_before_it_is_needed_where_that_is_asked_for(settings):
    toy, seen = settings(max_train_steps=3), []
    for ahead in (0, 2):
        run, student, critic = start(settings(f"ahead-{ahead}", max_train_steps=3), StopRequest())

        def record(draws, run=run):
            seen.append(run.step)
            return record_points(toy, run, draws)

        for batch in run.batches(record, rows_per_prompt=1, num_prompts=16, ahead=ahead):
            for rows in batch:
                for model in (student, critic):
                    if run.due(model):
                        run.backward(model(rows.latents).square().mean(), model)
            run.update(*(model for model in (student, critic) if run.due(model)))
        assert seen == ([0, 1, 2] if ahead == 0 else [0, 0, 0])
        seen.clear()
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("request_", ["latest", "checkpoint-2", None])
def test_a_folder_that_another_run_uses_is_refused_before_anything_is_read(settings, tmp_path, request_):
    if request_ is None:
        OwnedFolder(tmp_path / "run").claim()
    else:
        run_toy(settings(checkpointing_steps=2))
    gc.collect()  # the run that is over, and its lock
    with (tmp_path / "run" / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"`output_dir` .* belongs to a run that still goes on"):
            run_toy(settings(resume_from_checkpoint=request_, max_train_steps=9))
    AcceleratorState._reset_state(reset_partial_state=True)
    run_toy(settings(resume_from_checkpoint=request_, max_train_steps=9))


def test_launch_gives_the_exit_codes(settings, monkeypatch, capsys):
    class Ended:
        stopped, pushed = True, True
        accelerator = Accelerator(cpu=True)

    with pytest.raises(SystemExit) as ended:
        launch(lambda settings, stop: Ended(), settings())
    assert ended.value.code == 75 and "--resume_from_checkpoint latest goes on" in capsys.readouterr().out
    Ended.stopped, Ended.pushed = False, False
    with pytest.raises(SystemExit) as ended:
        launch(lambda settings, stop: Ended(), settings())
    assert ended.value.code == 1


@pytest.mark.parametrize("nodes", [1, 2], ids=["two processes", "two nodes"])
def test_two_processes_give_the_weights_of_one(settings, tmp_path, nodes):
    run_toy(settings("one", use_ema=True))
    flags = {"output_dir": tmp_path / "two", "max_train_steps": 8, "train_batch_size": 2, "report_to": "none"}
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    launch_processes([*arguments, "--use_ema"], script=toy_run.__file__, nodes=nodes)
    for actual, expected in zip(weights(tmp_path / "two", 8), weights(tmp_path / "one", 8), strict=True):
        assert largest_relative_difference(actual, expected) < 1e-5


def digests(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "`seed` 0, now 5"),
        ({"use_ema": True}, "`use_ema` false, now true"),
        ({"optimizer": "came"}, '`optimizer` "adamw", now "came"'),
        ({"weight_decay": 0.1}, "`weight_decay` 0.0, now 0.1"),
        ({"lr_scheduler": "cosine"}, '`lr_scheduler` "constant", now "cosine"'),
        ({"train_batch_size": 2}, "`train_batch_size` 4, now 2"),
        ({"dropped": 0.5}, "`dropped` 0.0, now 0.5"),
        ({"max_train_steps": 3}, "`max_train_steps` is 3, but checkpoint .* is already at step 4"),
    ],
)
def test_another_run_is_refused_before_anything_is_written(settings, tmp_path, changes, message):
    run_toy(settings(max_train_steps=4))
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=message):
        run_toy(settings(resume_from_checkpoint="latest", **{"max_train_steps": 8, **changes}))
    assert digests(tmp_path) == before


def train_critic(settings, content="a"):
    """One model alone, that is trained at the settings' learning rate."""
    run = Run(settings, StopRequest(), script=__file__)
    run.depends_on(prompts=content)
    run.open_folder()
    critic = run.add("critic", Net(), lr_scheduler=settings.lr_scheduler)
    for batch in run.batches(lambda draws: record_points(settings, run, draws), rows_per_prompt=1, num_prompts=16):
        for rows in batch:
            run.backward(critic(rows.latents).square().mean(), critic)
        run.update(critic)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_other_content_is_refused(settings):
    train_critic(settings(max_train_steps=1))
    train_critic(settings(max_train_steps=2, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match=r"another prompts \(prompts: a, now b\)"):
        train_critic(settings(max_train_steps=3, resume_from_checkpoint="latest"), content="b")


def test_what_may_change_is_applied_and_recorded_from_then_on(settings, tmp_path):
    def flags(**changes):
        return settings(resume_from_checkpoint="latest", **changes)

    run_toy(settings(max_train_steps=2, weight_decay=0.1, lr_scheduler="constant"))
    run_toy(flags(max_train_steps=4, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler="constant",
                  resume_with_changed=["weight_decay", "max_grad_norm"]))  # fmt: skip
    run = run_toy(flags(max_train_steps=6, weight_decay=0.0, max_grad_norm=1.0))
    groups = [trained.optimizer.param_groups[0] for trained in run._trained]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0]
    recorded = json.loads((tmp_path / "run" / "training_config.json").read_text())["changes"]
    assert recorded == [
        {"step": 2, "max_train_steps": [2, 4], "max_grad_norm": [0.1, 1.0], "weight_decay": [0.1, 0.0]},
        {"step": 4, "max_train_steps": [4, 6]},
    ]
    assert "weight_decay 0.1 until step 2, then 0.0" in str(run.history)


def test_a_longer_schedule_goes_on_as_if_it_had_been_so_long_from_the_start(settings, tmp_path):
    options = {"lr_scheduler": "cosine", "checkpointing_steps": 4}
    run_toy(settings("straight", **options))
    run_toy(settings("longer", max_train_steps=4, **options))
    run_toy(settings("longer", resume_from_checkpoint="latest", **options))
    longer, straight = ([line["lr"] for line in metrics(tmp_path / name)] for name in ("longer", "straight"))
    assert longer[4:] == straight[4:] and longer[3] == 0 < longer[4]


def test_a_batch_cut_in_another_way_goes_on_with_the_same_draws(settings, tmp_path):
    run_toy(settings("straight"))
    run_toy(settings("cut", max_train_steps=5))
    run_toy(settings("cut", resume_from_checkpoint="latest", train_batch_size=1, gradient_accumulation_steps=4))
    for actual, expected in zip(weights(tmp_path / "cut", 8), weights(tmp_path / "straight", 8), strict=True):
        assert largest_relative_difference(actual, expected) < 1e-4


def poison(monkeypatch, first, last=10**9):
    """Make the rows of some steps, counted from 1, not a number."""

    def record(settings, run, draws):
        recording, keep = record_points(settings, run, draws)
        if first <= run.step + 1 <= last:
            recording.latents.fill_(float("nan"))
        return recording, keep

    monkeypatch.setattr(toy_run, "record_points", record)


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_a_diverging_run_keeps_a_checkpoint_from_before_the_trouble_and_names_it(settings, tmp_path, monkeypatch):
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_skipped_steps": 3, "max_train_steps": 20}
    with monkeypatch.context() as patch:
        poison(patch, 4)
        with pytest.raises(
            RuntimeError, match=r"3 steps in a row .* in checkpoint-6; resume from checkpoint-2, which"
        ):
            run_toy(settings(**options))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-6"]
        with pytest.raises(RuntimeError, match=r"in checkpoint-9; resume from checkpoint-2, which"):  # tried once more
            run_toy(settings(resume_from_checkpoint="latest", **options))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-9"]
    changed = {"max_grad_norm": 0.05, "resume_with_changed": ["max_grad_norm"]}
    run_toy(settings(resume_from_checkpoint="checkpoint-2", **options, **changed))
    assert "checkpoint-2" not in names(tmp_path / "run")
    assert all(weight.isfinite().all() for part in weights(tmp_path / "run", 20) for weight in part.values())


def test_after_the_trouble_rotation_goes_on(settings, tmp_path, monkeypatch):
    poison(monkeypatch, 4, 5)
    run_toy(settings(checkpointing_steps=1, checkpoints_total_limit=2, max_skipped_steps=3, max_train_steps=12))
    assert names(tmp_path / "run") == ["checkpoint-11", "checkpoint-12"]


def test_a_lower_learning_rate_is_used_where_it_is_asked_for(settings, tmp_path):
    lower = {"learning_rate": 1e-5, "resume_from_checkpoint": "latest", "max_train_steps": 4}
    train_critic(settings(max_train_steps=2, learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"`learning_rate` 0\.001, now 1e-05: .*`resume_with_changed`"):
        train_critic(settings(**lower))
    train_critic(settings(**lower, resume_with_changed=["learning_rate"]))
    assert [line["lr"] for line in metrics(tmp_path / "run")] == [1e-3, 1e-3, 1e-5, 1e-5]


@pytest.mark.parametrize(
    ("changes", "first_bad", "message"),
    [
        ({"dropped": 1.0}, 10**9, r"the weights of the student are still those .* \(32 prompts were dropped, 0 steps"),
        ({}, 1, r"the weights of the student are still those .* \(0 prompts were dropped, 8 steps not finite\); try"),
    ],
    ids=["no rows", "no finite step"],
)
def test_what_was_not_trained_is_not_exported(settings, monkeypatch, changes, first_bad, message):
    poison(monkeypatch, first_bad)
    with pytest.raises(RuntimeError, match=f"nothing is exported: after 8 steps {message}"):
        run_toy(settings(**changes))


def test_weights_that_are_not_finite_are_neither_exported_nor_resumed(settings, tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def overflow(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(self)
        if len(calls) == 3:  # the student's first, after two of the critic's
            self.param_groups[0]["params"][0].data[0] = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        with pytest.raises(
            RuntimeError, match="nothing is exported: after 2 steps the weights of the student are not"
        ):
            run_toy(settings(max_train_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="checkpoint-2': weights of the student are not finite"):
        run_toy(settings(max_train_steps=4, resume_from_checkpoint="latest"))


def test_a_step_without_rows_does_not_end_an_fp16_run(settings, tmp_path, monkeypatch):
    build = Accelerator.__init__

    def with_scaler(self, *args, mixed_precision=None, **options):
        build(self, *args, mixed_precision="no", **options)
        self.state._mixed_precision, self.native_amp = "fp16", True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    toy = settings(max_train_steps=5, mixed_precision="fp16")
    run = Run(toy, StopRequest(), script=__file__)
    run.open_folder()
    critic = run.add("critic", Net())

    def record(draws):
        recording, keep = record_points(toy, run, draws)
        return recording, keep & (run.step not in (1, 2))

    seen = [critic.state_dict()["0.weight"].clone()]
    for batch in run.batches(record, rows_per_prompt=1, num_prompts=16, drops=True, ahead=0):
        for rows in batch:
            run.backward(critic(rows.latents).square().mean(), critic)
        run.update(critic)
        seen.append(critic.state_dict()["0.weight"].clone())
    assert [torch.equal(a, b) for a, b in pairwise(seen)] == [False, True, True, False, False]
    assert run.accelerator.scaler.get_scale() == 2.0**8


def damage_state(checkpoint, kind):
    """Change what a checkpoint holds of the student's optimiser or average; its manifest goes along."""
    name = "ema.safetensors" if kind.startswith("average") else "optimizer.bin"
    if name == "optimizer.bin":
        state = torch.load(checkpoint / name, weights_only=True)
        for part in state["state"].values():
            part["exp_avg"] = torch.zeros(3) if kind == "other shapes" else part["exp_avg"] * float("nan")
        torch.save(state, checkpoint / name)
    else:
        averages = load_file(checkpoint / name)
        changed = (
            {key: value[:1] for key, value in averages.items()} if kind == "averages cut" else {"x": torch.ones(1)}
        )
        save_file(changed, checkpoint / name)
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest["files"][name] = (checkpoint / name).stat().st_size
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not finite", "states of the student's optimiser are not finite"),
        ("other shapes", "states of the student's optimiser have other shapes than its weights"),
        ("averages cut", "it lacks averages of the student, or they have other shapes"),
        ("averages of others", "it lacks averages of the student, or they have other shapes"),
    ],
)
def test_a_checkpoint_whose_states_do_not_fit_is_refused_before_a_step(settings, tmp_path, kind, message):
    run_toy(settings(max_train_steps=4, use_ema=True))
    damage_state(tmp_path / "run" / "checkpoint-4", kind)
    with pytest.raises(ValueError, match=f"checkpoint '.*checkpoint-4': {message}"):
        run_toy(settings(resume_from_checkpoint="latest", use_ema=True))


def test_a_folder_that_the_first_process_refuses_ends_the_others_without_a_word(tmp_path):
    OwnedFolder(tmp_path / "run").claim()
    (tmp_path / "run" / "metrics.jsonl").write_text("mine")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        toy_run.__file__,
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run"), "--report_to", "none"],
        env=environment, stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0 and done.stderr.count("toy_run.py: error: ") == 1
    assert "[rank1]: Traceback" not in done.stderr and "did not write" in done.stderr
