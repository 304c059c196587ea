"""A training run: everything of it that is not the algorithm, as verbs that a script calls in order.

    run = Run(settings, ...)                     # accelerate, folder, place to resume from, trackers
    student = run.add("student", model, ...)     # a trained model, its optimiser, schedule and average
    for batch in run.batches(record, ...):       # a step: as many micro-steps as gradients are accumulated over
        for rows in batch:
            run.backward(loss, student)
        run.update(student)                      # clip, skip what is not finite, step, average; log, checkpoint

Several models may train in turn: one that was added with `every=2` is updated in every second step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from filelock import FileLock
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..components import MODEL_INDEX
from ..draws import draw_generator
from ..errors import Failure
from ..export.hub import choose_license, prepare_repo, push_or_warn
from ..export.record import training_config
from ..files import write_json
from ..lora import drop_frozen_weights
from ..owned import MARKER, OwnedFolder
from ..pipeline_folder import METRICS_LOG, TRAINING_CONFIG
from ..rows import TrainingRows
from ..transfer import HostCopy, to_device
from .accelerators import check_launch, ending_together, keep_whole_states, shard_again
from .checkpoints import find_checkpoint, load_checkpoint, load_run_state, rotate_checkpoints, save_checkpoint
from .health import STILL, Health, untrained
from .interruption import StopRequest
from .memory import peak_memory
from .optimizers import hyperparameters
from .resumption import PROCESSES, History
from .run_folder import check_way, last_kept, set_aside_later
from .settings import RunSettings
from .stream import Record, RowStream
from .tracking import MetricsLog
from .trained import Trained, prepare_trained


logger = get_logger(__name__)


class _MicroSteps:
    """A step's micro-steps, to be gone through as often as there are models to update one after another."""

    def __init__(self, go_through: Callable[[list[tuple[TrainingRows, int]]], Iterator[TrainingRows]]) -> None:
        self._go_through = go_through
        self._made: list[tuple[TrainingRows, int]] = []

    def __iter__(self) -> Iterator[TrainingRows]:
        return self._go_through(self._made)


class Run:
    """One process of a training run.

    It resumes bit for bit, its randomness is keyed by (seed, draw) and not by processes, and neither a full disk, a
    tracker nor a step that is not finite ends it. SIGTERM and SIGINT end it after a checkpoint: `stopped` says so.

    Args:
        settings: of the run.
        stop: notes the signals.
        script: the training script, whose revision is recorded.
        num_models: how many models the script trains.
        shards: whether FSDP2 may shard them: the script calls what `add` gives, and nothing else of them.

    Attributes:
        accelerator: accelerate's.
        step: steps done.
        resumed: the checkpoint that the run goes on from, or None.
        config: the settings, versions and changes on the way, as `training_config.json` holds them.
        history: what it was told and what changed.
        health: whether its steps are finite.

    Raises:
        ValueError: where the launch is one that is not tested, a tracker is not installed, another run uses the
            folder, or the checkpoint to resume from is not whole or was trained with other settings.
    """

    def __init__(
        self,
        settings: RunSettings,
        stop: StopRequest,
        *,
        script: str | PathLike[str],
        num_models: int = 1,
        shards: bool = True,
    ) -> None:
        self.settings = settings
        self.output_dir = Path(settings.output_dir)
        report_to = None if settings.report_to == "none" else settings.report_to
        self.accelerator = Accelerator(
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            mixed_precision=settings.mixed_precision,
            log_with=report_to,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / "logs")
            ),
        )
        set_seed(settings.seed)
        torch.backends.cuda.matmul.allow_tf32 = settings.allow_tf32
        check_launch(self.accelerator, settings.report_to, num_models=num_models, shards=shards)
        keep_whole_states(self.accelerator)
        self.config = training_config(asdict(settings), script)
        self.resumed: Path | None = None
        self.step = 0
        self.folder = OwnedFolder(self.output_dir)
        self._lock: FileLock | None = None
        with ending_together(self.accelerator):
            if settings.resume_from_checkpoint is not None:
                self._hold()
                self.resumed, self.step = find_checkpoint(self.output_dir, settings.resume_from_checkpoint)
            self._then = {} if self.resumed is None else load_run_state(self.resumed)
            told = self.config["flags"] | {
                "mixed_precision": self.accelerator.mixed_precision,
                PROCESSES: self.accelerator.num_processes,
            }
            self.history = History(
                told, checkpoint=self.resumed, then=self._then, step=self.step, allowed=settings.resume_with_changed
            )
        self.config["changes"] = self.history.changes
        self.health = Health(settings.max_skipped_steps)
        if self.resumed is not None:
            self.health.go_on(self._then["health"], self.resumed.name)
        self.stopped = False
        self.pushed = True  # or nothing was to be pushed
        self._stop = stop
        self._push: partial[bool] | None = None
        self._trained: list[Trained] = []
        self._begun: RowStream | None = None
        self._measures: dict[str, torch.Tensor | float] = {}
        self._going_through = 0  # the step that the script is in, also after its last update
        self._in_micro_step = False
        self._waiting: set[str] = set()  # models that went backward and were not updated yet
        self._updated: set[str] = set()  # models that were updated in this step
        self._norms: dict[str, float] = {}  # of their gradients
        self._dropped = 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def weight_dtype(self) -> torch.dtype:
        """The training precision, in which frozen networks run."""
        precisions = {"fp16": torch.float16, "bf16": torch.bfloat16}
        return precisions.get(self.accelerator.mixed_precision, torch.float32)

    def say(self, message: object) -> None:
        """Log a message, once for all processes."""
        logger.info(str(message), main_process_only=True)

    # What comes before training

    def check_push(self, model_folder: Path) -> None:
        """Make sure that the student can be published, before anything is computed; without `push_to_hub` nothing.

        Args:
            model_folder: the teacher's folder, whose card may name the licence.

        Raises:
            ValueError: where licence, token or repository do not allow it.
            RuntimeError: where the Hub cannot be reached.
        """
        settings = self.settings
        with ending_together(self.accelerator):
            if not (settings.push_to_hub and self.accelerator.is_main_process):
                return
            try:
                terms = choose_license(model_folder, settings.hub_license)
            except ValueError as error:
                raise ValueError(f"`hub_license`: {error}") from error
            repo_id = prepare_repo(
                settings.hub_model_id or self.output_dir.resolve().name,
                token=settings.hub_token,
                private=settings.hub_private_repo,
            )
            self._push = partial(push_or_warn, repo_id=repo_id, token=settings.hub_token, license=terms)

    def depends_on(self, **content: str) -> None:
        """Note what the result depends on beside the settings, such as teacher and data; checkpoints carry it.

        Args:
            content: names and digests, by what they are of.

        Raises:
            ValueError: where the checkpoint to resume from was trained with something else.
        """
        with ending_together(self.accelerator):
            self.history.depends_on(content)

    def open_folder(self) -> None:
        """Begin to write: `output_dir` becomes ours. Whatever else is wrong should be found before.

        Raises:
            ValueError: where the folder is not ours, another run's, or cannot be written to, or what this run is going
                to write would replace something that is not ours.
        """
        with ending_together(self.accelerator):
            if not self.accelerator.is_main_process:
                return
            folder = self.folder
            folder.claim()
            self._hold()
            folder.check_renaming()
            check_way(folder, last_kept(folder, self.resumed, self.step), self.settings.max_train_steps)
            folder.own(METRICS_LOG)
            if not (self.output_dir / MODEL_INDEX).exists():  # a student keeps what it was made with until it goes
                with folder.written(TRAINING_CONFIG) as partial:
                    write_json(partial, self.config)

    def own(self, name: str) -> Path:
        """Say that a file or folder in `output_dir` is the run's, to be read, written and replaced.

        Args:
            name: path in it.

        Returns:
            The path.

        Raises:
            ValueError: where something else has that name.
        """
        with ending_together(self.accelerator):
            if self.accelerator.is_main_process:
                self.folder.own(name)
        return self.output_dir / name

    def _hold(self) -> None:
        """Keep other runs out of a folder of ours, for as long as this one lives."""
        if self.accelerator.is_main_process and (self.output_dir / MARKER).is_file():
            self._lock = self.folder.hold()

    def add(
        self,
        name: str,
        model: nn.Module,
        *,
        exported: str = "",
        learning_rate: float | None = None,
        lr_scheduler: str | None = None,
        every: int = 1,
        ema: bool = False,
    ) -> nn.Module:
        """Take in a model to train, the one to export first: all of its parameters that require a gradient.

        Args:
            name: what its figures are called in the logs.
            model: on any device.
            exported: the part of it, by its module path, that `ema` averages and `weights` gives; all by default.
            learning_rate: the run's by default.
            lr_scheduler: name of a schedule, over its updates; None keeps the rate.
            every: it is updated in every so many steps of the run.
            ema: average its weights.

        Returns:
            The model to call from now on, prepared by accelerate.

        Raises:
            RuntimeError: where training has begun.
        """
        if self._begun is not None:
            raise RuntimeError(f"model {name!r} is added after `batches` has begun: add it before")
        settings = self.settings
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        frozen = len(parameters) < len(list(model.parameters()))
        if frozen and not self._partial and not self.accelerator.is_fsdp2:  # whose state dicts no hook is given
            self.accelerator.register_save_state_pre_hook(drop_frozen_weights)
        trained = prepare_trained(
            self.accelerator,
            settings,
            name,
            model,
            exported=exported,
            learning_rate=settings.learning_rate if learning_rate is None else learning_rate,
            lr_scheduler=lr_scheduler,
            every=every,
            ema=ema,
            steps_done=self.step,
        )
        self._trained.append(trained)
        return trained.model

    # The loop

    def batches(
        self,
        record: Record,
        *,
        rows_per_prompt: int,
        num_prompts: int,
        drops: bool = False,
        recorded_at_once: int | None = None,
        buffer_size: int = 0,
        replay_steps: int = 1,
        ahead: int = 2,
    ) -> Iterator[Iterable[TrainingRows]]:
        """Resume, and go through the steps that are left.

        Args:
            record: makes the recording of some draws and says which prompts to keep, as `RowStream` calls it.
            rows_per_prompt: places of a recording.
            num_prompts: how many there are to draw from.
            drops: whether `record` may drop prompts; gradients are then scaled to those that are kept.
            recorded_at_once: prompts per process that `record` is called for; by default those of a micro-step.
            buffer_size, replay_steps: as `RowStream` takes them.
            ahead: recordings made before they are needed; 0 where they have to know the latest weights.

        Yields:
            The micro-steps of a step: iterated over, they give the rows of each; iterated over again, for a model that
            is updated after another, the same rows.

        Raises:
            ValueError: where the checkpoint to resume from does not fit, or its weights are not finite.
            RuntimeError: where verbs come in the wrong order: no model was added, a step was not finished by
                `update`; where too many steps in a row were not finite; at the end, where weights of the first model
                are not finite or have not moved.
        """
        if not self._trained:
            raise RuntimeError("there is nothing to train: `add` a model before `batches`")
        settings, accelerator = self.settings, self.accelerator
        self._drops = drops
        self._begun = RowStream(
            record,
            rows_per_prompt=rows_per_prompt,
            num_prompts=num_prompts,
            batch_size=settings.train_batch_size,
            recorded_at_once=recorded_at_once or settings.train_batch_size,
            buffer_size=buffer_size,
            replay_steps=replay_steps,
            ahead=ahead,
            seed=settings.seed,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )
        self._stop.finish_steps()
        self._begin()
        accumulation = settings.gradient_accumulation_steps
        self._first_number = -(-self.step * accumulation // replay_steps)
        self._stream.start(self.step * accumulation, settings.max_train_steps * accumulation)
        # Of the step, in all processes: rows kept, prompts dropped, requests to stop.
        self._counts = torch.zeros(3, device=self.device)
        while self.step < settings.max_train_steps and not self.stopped:
            self._going_through = step = self.step
            yield _MicroSteps(self._micro_steps)
            if self.step == step:
                raise RuntimeError(
                    f"step {step} ended without `update` of {', '.join(sorted(self._due()))}: call it after the"
                    " micro-steps"
                )
        self.progress.close()
        if not self.stopped:
            self._finish()

    def backward(self, loss: torch.Tensor, model: nn.Module) -> None:
        """Add the gradient of a micro-step's loss, a mean over its rows; rows that do not count weigh nothing.

        Args:
            loss: a scalar.
            model: the model of `add` that it is for.

        Raises:
            RuntimeError: outside a micro-step.
            ValueError: for a model that was not added, or that is not due in this step.
        """
        trained = self._find(model)
        if not self._in_micro_step:
            raise RuntimeError("`backward` is called outside the micro-steps that `batches` gives")
        if trained.name not in self._due():
            raise ValueError(f"model {trained.name!r} is not due in step {self.step}: ask `due` before `backward`")
        self.accelerator.backward(loss * self._weight)
        self._waiting.add(trained.name)
        self._measures[f"{self._prefix(trained)}loss"] = loss.detach()

    def due(self, model: nn.Module) -> bool:
        """Say whether a model is to be updated in the step that the script is in."""
        return self._find(model).name in self._due()

    def log(self, **measures: torch.Tensor | float) -> None:
        """Note figures of the micro-step, which are logged when that is due.

        Args:
            measures: scalars by name; a vector goes into metrics.jsonl alone.
        """
        self._measures |= measures

    @property
    def has_rows(self) -> bool:
        """Whether rows of the micro-step count: where all prompts were dropped, they keep processes in step only."""
        return self._weight > 0

    def generators(self, count: int, *, stream: int) -> list[torch.Generator]:
        """Make the generators of what else is random about a micro-step, one a row: they know the seed and its number.

        Args:
            count: rows.
            stream: a number of the script's own, 2 or more, for each use.

        Returns:
            CPU generators.
        """
        first = self._stream.draw(self._micro_step) * self._stream.rows_per_micro_step
        return [draw_generator(first + index, self.settings.seed, stream=stream) for index in range(count)]

    def update(self, *models: nn.Module, then: Callable[[], None] | None = None) -> None:
        """Take an optimiser step of models, all or none: clip, skip what is not finite, step, average.

        With the last model that is due the step is done: it is logged and a checkpoint is written where that is due.

        Args:
            models: from `add`.
            then: changes weights further, where the optimisers have stepped; checkpoints know it as done.

        Raises:
            RuntimeError: for a model without `backward`, or inside a step's micro-steps; where too many steps in a row
                were not finite, after a checkpoint.
        """
        trained = [self._find(model) for model in models]
        for part in trained:
            if part.name not in self._waiting or self._in_micro_step:
                raise RuntimeError(f"`update` of {part.name!r} comes before the `backward` of all its micro-steps")
        stream, accelerator = self._stream, self.accelerator
        norms = [self._clip(part) for part in trained]
        status = HostCopy(torch.cat([self._counts, torch.stack(norms)]))
        stream.prefetch()
        kept, dropped, stops, *found = status.read().tolist()
        finite = all(map(math.isfinite, found))
        if kept == 0:
            logger.warning(f"Step {self.step + 1}: the filter dropped every prompt; no update")
            if accelerator.scaler is not None:  # forget that `_clip` has unscaled the gradients; the scale stays
                accelerator.scaler.update(accelerator.scaler.get_scale())
        elif finite or accelerator.scaler is not None:  # with fp16 the scaler skips a step that is not finite
            for part in trained:
                part.optimizer.step()
        if kept > 0 and finite and then is not None:
            for part in self._trained:
                shard_again(part.model)
            then()
        for part in trained:
            if kept > 0 and finite and part.ema is not None:
                part.ema.step(part.averaged.values())
            part.optimizer.zero_grad()
            if part.lr_scheduler is not None:
                part.lr_scheduler.step()
            self._waiting.discard(part.name)
            self._updated.add(part.name)
        self._norms |= {part.name: norm for part, norm in zip(trained, found, strict=True)}
        if self._due() <= self._updated:
            self._end_step(int(kept), int(dropped), stops > 0)

    # After or between steps

    @property
    def validation_due(self) -> bool:
        """Whether `validation_prompts` are to be drawn now, before training goes on; at the end export does it."""
        return bool(self.settings.validation_prompts) and self._falls_on(self.settings.validation_steps)

    @property
    def push_due(self) -> bool:
        """Whether the student is to be exported and pushed now, before training goes on."""
        on_checkpoint = self.settings.hub_strategy == "checkpoint" and self._falls_on(
            self.settings.checkpointing_steps
        )
        return on_checkpoint and not self.health.recovering

    @property
    def round_steps(self) -> int:
        """In how many steps every model is updated."""
        return max(trained.every for trained in self._trained)

    @property
    def prompts_seen(self) -> int:
        """Prompts recorded so far, in all processes."""
        return self._stream.number * self._stream.prompts_per_recording

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Gather the exported part of a model, averaged where it has an average; every process calls this.

        Args:
            model: from `add`.

        Returns:
            Whole weights by name.
        """
        trained = self._find(model)
        prefix = f"{trained.exported}." if trained.exported else ""
        weights = {
            name.removeprefix(prefix): weight
            for name, weight in self.accelerator.get_state_dict(trained.model).items()
            if name.startswith(prefix)
        }
        if trained.ema is not None:
            weights |= zip(trained.averaged, trained.ema.full_weights(), strict=True)
        return weights

    def push(self, folder: Path) -> None:
        """Publish an exported folder where that was asked for; the main process calls this. `pushed` says how it went.

        Args:
            folder: a pipeline or LoRA that was saved.
        """
        if self._push is not None:
            self.pushed = self._push(folder)

    # Below, what the verbs are made of

    @property
    def _partial(self) -> bool:
        """Whether some weights of a trained model are frozen, and not in checkpoints."""
        return any(not parameter.requires_grad for part in self._trained for parameter in part.model.parameters())

    @property
    def _stream(self) -> RowStream:
        if self._begun is None:
            raise RuntimeError("training has not begun: go through `batches` first")
        return self._begun

    def _find(self, model: nn.Module) -> Trained:
        for trained in self._trained:
            if trained.model is model:
                return trained
        names = ", ".join(trained.name for trained in self._trained)
        raise ValueError(
            f"a {type(model).__name__} is none of the run's models ({names}): `add` it, call what it gives"
        )

    def _prefix(self, trained: Trained) -> str:
        """What stands before the names of a model's figures: nothing for the first one."""
        return "" if trained is self._trained[0] else f"{trained.name}_"

    def _due(self) -> set[str]:
        return {trained.name for trained in self._trained if (self._going_through + 1) % trained.every == 0}

    def _falls_on(self, interval: int) -> bool:
        return self.step % interval == 0 and self.step < self.settings.max_train_steps and not self.stopped

    def _begin(self) -> None:
        """Load what the checkpoint holds, start the logs."""
        for trained in self._trained:
            if trained.ema is not None:
                trained.ema.to(self.device)
        if self.resumed is not None:
            self._load(self.resumed)
        with ending_together(self.accelerator):
            if self.accelerator.is_main_process:
                set_aside_later(self.folder, last_kept(self.folder, self.resumed, self.step))
        if self.settings.report_to != "none":
            flags = {name: str(value) for name, value in self.config["flags"].items()}
            try:
                self.accelerator.init_trackers("tbcm", config=flags)
            except Exception as error:  # whatever a tracker does, the run outlives it
                logger.warning(f"`report_to` {self.settings.report_to} failed and is left out: {error!r}")
        self.metrics = MetricsLog(self.accelerator, self.output_dir / METRICS_LOG, first_step=self.step)
        self.progress = tqdm(
            total=self.settings.max_train_steps,
            initial=self.step,
            desc="Steps",
            disable=not self.accelerator.is_local_main_process,
        )
        self._rows_since_log, self._last_log = 0, time.perf_counter()

    def _micro_steps(self, made: list[tuple[TrainingRows, int]]) -> Iterator[TrainingRows]:
        """The rows of a step, micro-step by micro-step; in between, gradients stay in their process.

        `made` holds rows, and how many of them count, of micro-steps that were gone through before.
        """
        stream, accelerator = self._stream, self.accelerator
        accumulation = self.settings.gradient_accumulation_steps
        first = self.step * accumulation
        for index in range(accumulation):
            self._micro_step = first + index
            if index == len(made):
                made.append(stream.rows(self._micro_step))
                counts = torch.tensor([made[-1][1], stream.dropped, float(self._stop.received)])
                self._counts += accelerator.reduce(to_device(counts, self.device))
            rows, kept = made[index]
            self._weight = kept / stream.rows_per_micro_step
            with accelerator.accumulate(*(trained.model for trained in self._trained)):
                self._in_micro_step = True
                yield rows
                self._in_micro_step = False
            if index < accumulation - 1:  # after the last one `update` has more to queue before
                stream.prefetch()

    def _clip(self, trained: Trained) -> torch.Tensor:
        """Make a gradient the mean over the rows kept in all processes and micro-steps, and clip it; its norm."""
        stream, accelerator = self._stream, self.accelerator
        expected = stream.rows_per_micro_step * accelerator.num_processes * self.settings.gradient_accumulation_steps
        if self._drops:
            scale = expected / self._counts[0].clamp(min=1)
            for parameter in trained.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        accelerator.unscale_gradients(trained.optimizer)
        # Not accelerate's own clipping: under FSDP2 that looks for the model by comparing weights of all models.
        norm = nn.utils.clip_grad_norm_(trained.model.parameters(), self.settings.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _end_step(self, kept: int, dropped: int, stop: bool) -> None:
        """Count a step, report it, write a checkpoint where that is due."""
        settings, stream = self.settings, self._stream
        self._counts.zero_()
        self._updated.clear()
        self.step += 1
        self.progress.update()
        self.stopped |= stop
        self._dropped += dropped
        self._rows_since_log += kept
        bad = {name: norm for name, norm in self._norms.items() if not math.isfinite(norm)}
        if (kept > 0 or bad) and self.health.note_step(finite=not bad):
            self._rotate()
        if bad:
            numbers = stream.prompt_numbers(settings.gradient_accumulation_steps)
            norms = ", ".join(f"{norm} of the {name}" for name, norm in bad.items())
            logger.warning(
                f"Step {self.step}: gradient norm {norms}, no update; its prompts are among numbers {numbers}"
            )
        last = self.step == settings.max_train_steps
        failing = self.health.failing
        if self.step % settings.logging_steps == 0 or last or bad:
            self._report()
        self._norms.clear()
        if self.step % settings.checkpointing_steps == 0 or last or self.stopped or failing:
            self._save()
        self.stopped &= not last  # there is nothing left to stop
        if failing:
            self.progress.close()  # the reason comes last
            newest = self.health.newest
            weights = "" if newest is None else f" the weights from before them are in {newest};"
            raise Failure(
                f"{self.health.skipped_in_a_row} steps in a row were not finite (`max_skipped_steps`):{weights}"
                f" {self.health.advice()}"
            )

    def _save(self) -> None:
        """Write a checkpoint; every process calls this."""
        averages: dict[str, torch.Tensor] = {}
        for trained in self._trained:
            averages |= trained.averages()
        steps = {trained.name: trained.ema.optimization_step for trained in self._trained if trained.ema is not None}
        state = self.history.state() | {"averaged_steps": steps, "health": self.health.state()}
        saved = save_checkpoint(self.accelerator, self.output_dir, self.step, state=state, averages=averages)
        if saved is not None:
            self.health.newest = saved.name
            self._rotate()

    def _rotate(self) -> None:
        limit, health = self.settings.checkpoints_total_limit, self.health
        if limit is not None and health.newest is not None and self.accelerator.is_main_process:
            rotate_checkpoints(self.output_dir, health.newest, limit, sound=health.sound)

    def _load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: its weights and states, this run's hyperparameters."""
        wanted = [hyperparameters(trained.optimizer) for trained in self._trained]
        averages = load_checkpoint(self.accelerator, checkpoint, partial=self._partial)
        for trained in self._trained:
            if self.step < trained.every:  # FSDP2 saves a state of an optimiser without any
                trained.optimizer.state.clear()
        for trained, groups in zip(self._trained, wanted, strict=True):
            for group, values in zip(trained.optimizer.param_groups, groups, strict=True):
                group |= values
            try:
                trained.load_averages(averages, self._then["averaged_steps"])
                trained.check()
            except ValueError as error:
                raise ValueError(f"checkpoint {str(checkpoint)!r}: {error}") from error
        self.say(f"Resumed from {checkpoint} at step {self.step}")
        if self.history.changes:
            self.say(f"Changed on the way: {self.history}")

    def _finish(self) -> None:
        """Let no student, the first model, be exported that is not finite or was not trained."""
        student = self._trained[0]
        problem = untrained(self.accelerator, student.to_export, student.before)
        may_be_still = self.step < student.every or self.settings.dry_run  # whose one step may be dropped
        if problem is not None and not (problem == STILL and may_be_still):
            message = (
                f"nothing is exported: after {self.step} steps the weights of the {student.name} {problem}"
                f" ({self._dropped} prompts were dropped, {self.health.skipped} steps not finite)"
            )
            raise Failure(f"{message}; {self.health.advice()}" if self.health.skipped else message)
        self.health.sound = self.health.newest
        self._rotate()

    def _report(self) -> None:
        """Log the figures of the latest step."""
        stream, now = self._stream, time.perf_counter()
        recorded = max(1, (stream.number - self._first_number) * stream.prompts_per_recording)
        vectors = {
            name: value.tolist()
            for name, value in self._measures.items()
            if isinstance(value, torch.Tensor) and value.ndim > 0
        }
        metrics = {name: float(value) for name, value in self._measures.items() if name not in vectors}
        for trained in self._trained:
            prefix = self._prefix(trained)
            metrics[f"{prefix}lr"] = trained.optimizer.param_groups[0]["lr"]
            if trained.name in self._norms:
                metrics[f"{prefix}grad_norm"] = self._norms[trained.name]
        metrics |= {
            "filtered_share": self._dropped / recorded,
            "skipped_steps": self.health.skipped,
            "rows_per_second": self._rows_since_log / (now - self._last_log),
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        self._last_log, self._rows_since_log = now, 0
        self.progress.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()})
        self.metrics(metrics, self.step, vectors=vectors)
