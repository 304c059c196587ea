"""What a resumed run may change: its checkpoint says what it was told, and what differs is named and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


# Where things go and how often, and what makes a step cheaper: the weights are the same with another value.
FREE = frozenset({
    "output_dir", "resume_from_checkpoint", "resume_with_changed", "dry_run", "debug", "report_to", "logging_steps",
    "checkpointing_steps", "checkpoints_total_limit", "max_skipped_steps", "validation_prompts", "validation_steps",
    "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_license",
    "merge_lora", "export_variants", "precompute_embeddings", "latents_cache",
    "teacher_batch_size", "offload_text_encoder", "gradient_checkpointing", "compile", "allow_plain_teacher",
    "drift_steps", "drift_tolerance", "start_share",
    "stochastic_sampling", "intermediate_timesteps",
})  # fmt: skip
# What names teacher and data: these are compared by their content.
BY_CONTENT = frozenset({
    "pretrained_model_name_or_path", "student_model_name_or_path", "resolution", "prompts_file", "dataset_name",
    "dataset_config_name", "dataset_split", "caption_column", "streaming", "max_prompts",
    "train_data_dir", "image_column", "max_train_samples", "lora",
})  # fmt: skip
# What somebody may want to change on the way, and has to say so.
CHANGEABLE = (
    "learning_rate", "discriminator_learning_rate", "critic_learning_rate", "lr_scheduler", "lr_warmup_steps",
    "weight_decay", "max_grad_norm", "ema_decay", "mixed_precision", "allow_tf32", "endpoint_warmup_steps",
    "endpoint_loss_type",
)  # fmt: skip
# What a run did before there was a setting for it, where its default is something else; older checkpoints lack it.
BEFORE = {"endpoint_loss_type": "l2", "noise_share": 0.0}
LENGTH = "max_train_steps"
PROCESSES = "num_processes"
BATCH = ("train_batch_size", "gradient_accumulation_steps", PROCESSES)


class History:
    """What a run was told, what else its result depends on, and what has changed on the way; its checkpoints say so.

    Args:
        told: settings by name.
        checkpoint: what the run goes on from; None for a new run.
        then: that checkpoint's `state`.
        step: the checkpoint's.
        allowed: names of settings that are meant to differ from the checkpoint's.

    Attributes:
        changes: for every resumption that changed something, the step and the values before and after, by name.

    Raises:
        ValueError: naming the settings that differ in a way that would change the result.
    """

    def __init__(
        self,
        told: Mapping[str, Any],
        *,
        checkpoint: Path | None = None,
        then: Mapping[str, Any] | None = None,
        step: int = 0,
        allowed: Sequence[str] = (),
    ) -> None:
        self._told: dict[str, Any] = json.loads(json.dumps(told))  # as a file gives it
        self._checkpoint, self._then = str(checkpoint), then
        self._content: dict[str, str] = {}
        self.changes: list[dict[str, Any]] = []
        if then:
            changed = changed_settings(self._checkpoint, then["told"], self._told, step=step, allowed=allowed)
            self.changes = [*then["changes"], *([{"step": step, **changed}] if changed else [])]

    def depends_on(self, content: Mapping[str, str]) -> None:
        """Note what else the result depends on.

        Args:
            content: names and digests, by what they are of.

        Raises:
            ValueError: naming what the checkpoint has another of.
        """
        if self._then:
            check_content(self._checkpoint, self._then["content"], content)
        self._content |= content

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint is to hold, JSON values by name."""
        return {"told": self._told, "content": self._content, "changes": self.changes}

    def __str__(self) -> str:
        """What changed on the way, in words; empty where nothing did."""
        return "; ".join(
            f"{name} {values[0]} until step {change['step']}, then {values[1]}"
            for change in self.changes
            for name, values in change.items()
            if name != "step"
        )


def changed_settings(
    checkpoint: str, then: Mapping[str, Any], now: Mapping[str, Any], *, step: int, allowed: Sequence[str]
) -> dict[str, list[Any]]:
    """Compare what a checkpoint's run was told with what the one that goes on from it is told.

    Args:
        checkpoint: its path, for messages.
        then: values by name that the checkpoint holds.
        now: those of the run.
        step: the checkpoint's.
        allowed: names that may differ.

    Returns:
        The value before and now of each that changes and may.

    Raises:
        ValueError: naming every other one that differs in a way that would change the result, or the number of steps
            where it is below the checkpoint's.
    """
    if now[LENGTH] < step:
        raise ValueError(f"`{LENGTH}` is {now[LENGTH]}, but checkpoint {checkpoint!r} is already at step {step}")
    then = {**BEFORE, **then}
    changed = {
        name: [then[name], value]
        for name, value in now.items()
        if name not in FREE | BY_CONTENT and name in then and then[name] != value
    }
    if not any(told.get("endpoint_warmup_steps") for told in (then, now)):  # whose loss it would be
        changed.pop("endpoint_loss_type", None)
    batch_is_free = _keyed_by_draw(now) and _rows_a_step(then) == _rows_a_step(now)
    refused = {
        name: values
        for name, values in changed.items()
        if name != LENGTH and name not in allowed and not (name in BATCH and batch_is_free)
    }
    if refused:
        raise ValueError(_refusal(checkpoint, refused))
    if now.get("mixed_precision") == "fp16" and "mixed_precision" in changed:
        raise ValueError(
            f"`mixed_precision` is fp16, but checkpoint {checkpoint!r} was trained with"
            f" {then['mixed_precision']!r} and has no loss scale: use bf16 or no"
        )
    return changed


def check_content(checkpoint: str, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with other data, another teacher or another method than a checkpoint's.

    Args:
        checkpoint: its path, for messages.
        then: digests and names that the checkpoint holds.
        now: those of the run.

    Raises:
        ValueError: naming what differs.
    """
    differing = [name for name, value in now.items() if then.get(name, value) != value]
    if differing:
        name = differing[0]
        raise ValueError(
            f"checkpoint {checkpoint!r} was trained with another {', another '.join(differing)}"
            f" ({name}: {then[name]}, now {now[name]}): give the same again, or train in another `output_dir`"
        )


def _keyed_by_draw(now: Mapping[str, Any]) -> bool:
    """Whether rows depend on (seed, draw) alone, and not on which process and micro-step they fall to."""
    return now.get("replay_buffer_size", 0) == 0 and now.get("replay_steps", 1) == 1


def _rows_a_step(told: Mapping[str, Any]) -> int:
    return told["train_batch_size"] * told["gradient_accumulation_steps"] * told[PROCESSES]


def _refusal(checkpoint: str, refused: Mapping[str, Sequence[Any]]) -> str:
    listed = ", ".join(f"`{name}` {json.dumps(old)}, now {json.dumps(new)}" for name, (old, new) in refused.items())
    wanted = [name for name in refused if name in CHANGEABLE]
    older = " ".join(f"`{name}` {old}" for name, (old, _) in refused.items() if name in BEFORE)
    again = f"give its values again{f' ({older})' if older else ''}"
    change = f", name in `resume_with_changed` what is meant to change ({' '.join(wanted)})" if wanted else ""
    return f"checkpoint {checkpoint!r} was trained with {listed}: {again}{change}, or train in another `output_dir`"
