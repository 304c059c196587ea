"""What a training run is told: typed settings, each of them a flag of the scripts that have it.

A script's own settings inherit from those it shares; every class is a group of flags. Messages about a setting name it
in backticks, and on the command line as its flag.
"""

import dataclasses
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType
from transformers import HfArgumentParser

from ..command_line import DEBUG_HELP, CommandParser, name_flags
from ..data.pictures import CaptionedImages
from ..data.prompts import PromptList, is_text, load_prompts
from ..errors import in_a_line
from ..pipeline_folder import VARIANTS
from ..scheduling_tbcm import MAX_TIMESTEP, as_schedule
from .resumption import CHANGEABLE
from .run_folder import check_place


S = TypeVar("S", bound="RunSettings")

MAX_COUNT = 2**53  # what counts in tensors and floats can be
MAX_SEED = 2**32 - 1  # numpy's
OPTIMIZERS = ("adamw", "came")
# The piecewise constant one needs rules that no setting gives.
LR_SCHEDULERS = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)
PRECISIONS = ("no", "fp16", "bf16")
HUB_STRATEGIES = ("end", "checkpoint")
LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"}  # set by `accelerate launch` and `torchrun`


def setting(default: Any = dataclasses.MISSING, help: str = "", **options: Any) -> Any:
    """Declare a setting with its help; a list is copied for every instance, and without default it is required.

    Args:
        default: its value where nothing else is said.
        help: what it does.
        options: further keyword arguments of argparse's `add_argument`, such as `choices`.

    Returns:
        A dataclass field.
    """
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_positive(settings: object, *names: str) -> None:
    """Refuse settings that are not positive; None passes.

    Args:
        settings: holds them.
        names: which.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` is {value}: it has to be positive")


def check_not_negative(settings: object, *names: str) -> None:
    """Refuse settings below zero, in the way of `check_positive`."""
    for name in names:
        if getattr(settings, name) < 0:
            raise ValueError(f"`{name}` is {getattr(settings, name)}: it must not be negative")


def check_student_is_updated(settings: Any) -> None:
    """Refuse a run that ends before its student's first step, in every `student_every`-th; a dry run goes on."""
    steps, first = settings.max_train_steps, settings.student_every
    if steps < first and not settings.dry_run:
        raise ValueError(
            f"`max_train_steps` is {steps}: the student is first updated in step {first} (`student_every`)"
        )


def check_finite(settings: object) -> None:
    """Refuse numbers that are infinite, not a number or beyond any count, in the way of `check_positive`."""
    for name, value in vars(settings).items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(abs(number) > MAX_COUNT for number in numbers if isinstance(number, int)):
            raise ValueError(f"`{name}` is {value}: it is too large")
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ValueError(f"`{name}` is {value}: it has to be finite")


def check_text(settings: object) -> None:
    """Refuse text that no file, card or tokenizer takes, in the way of `check_positive`."""
    for name, value in vars(settings).items():
        texts = value if isinstance(value, list | tuple) else [value]
        if not all(is_text(text) for text in texts if isinstance(text, str)):
            raise ValueError(f"`{name}` is {value!r}: it has a NUL, or bytes that are not UTF-8")


def check_not_output(settings: "RunSettings", name: str) -> None:
    """Refuse a folder of a cache that is the run's own, in the way of `check_positive`."""
    folder = getattr(settings, name)
    if folder is not None and Path(folder).resolve() == Path(settings.output_dir).resolve():
        raise ValueError(f"`{name}` is {folder!r}, which is `output_dir`: name a folder of its own")


@dataclass(kw_only=True)
class RunSettings:
    """optimisation, checkpoints, logs, Hub"""

    output_dir: str = setting(help="where the student, its checkpoints and logs go")
    train_batch_size: int = setting(1, "prompts per process and backward pass")
    gradient_accumulation_steps: int = setting(1, "backward passes a step")
    max_train_steps: int = setting(20000, "optimiser steps")
    optimizer: str = setting("adamw", "of all models; came is the reference's", choices=OPTIMIZERS)
    learning_rate: float = setting(1e-5, "after the warm-up")
    lr_scheduler: str = setting("constant", "of the learning rate", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = setting(0, "of the learning rate from 0")
    weight_decay: float = setting(0.0, "of the optimiser")
    max_grad_norm: float = setting(0.1, "gradients are clipped to this norm")
    use_8bit_adam: bool = setting(False, "AdamW's states in 8 bits (bitsandbytes)")
    max_skipped_steps: int = setting(10, "non-finite steps in a row that end the run")
    use_ema: bool = setting(False, "validate and export averaged weights")
    ema_decay: float = setting(0.999, "of the averaged weights, a step")
    allow_tf32: bool = setting(False, "faster float32 products on an NVIDIA GPU")
    mixed_precision: str | None = setting(None, "default: accelerate's setting", choices=PRECISIONS)
    seed: int = setting(0, "of everything random")

    checkpointing_steps: int = setting(500, "steps from one checkpoint to the next")
    checkpoints_total_limit: int | None = setting(None, "older ones are deleted")
    resume_from_checkpoint: str | None = setting(None, "'latest' or a checkpoint folder")
    resume_with_changed: list[str] = setting(
        [], "settings that are meant to differ from the checkpoint's", choices=CHANGEABLE
    )
    validation_prompts: list[str] | None = setting(None, "drawn at 1, 2 and 4 steps")
    validation_steps: int = setting(500, "steps from one validation to the next")
    report_to: str = setting("tensorboard", "an accelerate tracker, or 'none'")
    logging_steps: int = setting(10, "steps from one line of metrics.jsonl to the next")
    dry_run: bool = setting(False, "everything once, in a folder that is deleted; report")
    debug: bool = setting(False, DEBUG_HELP)

    push_to_hub: bool = setting(False, "publish the student; access is checked at the start")
    hub_model_id: str | None = setting(None, "owner/name; default: the name of output_dir, under the token's user")
    hub_token: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata={"help": "better: HF_TOKEN or `hf auth login`, which no launcher or process list shows"},
    )
    hub_private_repo: bool | None = setting(None, "if the repository is created", nargs="?", const=True)
    hub_strategy: str = setting("end", "checkpoint: also at every checkpoint", choices=HUB_STRATEGIES)
    hub_license: str | None = setting(None, "such as apache-2.0, where the teacher's card names none")

    least_train_steps = 1  # a class attribute, and no setting

    def __post_init__(self) -> None:
        check_finite(self)
        check_text(self)
        check_not_negative(self, "lr_warmup_steps", "weight_decay", "seed")
        check = check_positive if self.least_train_steps else check_not_negative
        check(self, "max_train_steps")
        if self.seed > MAX_SEED:
            raise ValueError(f"`seed` is {self.seed}: the largest is {MAX_SEED}")
        check_positive(
            self, "train_batch_size", "gradient_accumulation_steps", "learning_rate",
            "max_grad_norm", "max_skipped_steps", "checkpointing_steps", "validation_steps", "logging_steps",
        )  # fmt: skip
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(
                f"`checkpoints_total_limit` is {self.checkpoints_total_limit}: the last one is always kept"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}: it has to lie in [0, 1)")
        if self.report_to not in ("none", *map(str, LoggerType)):
            raise ValueError(f"`report_to` is {self.report_to!r}: it takes none, {', '.join(map(str, LoggerType))}")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise ValueError(f"`use_8bit_adam` is AdamW's, `optimizer` is {self.optimizer}")
        if self.use_8bit_adam and find_spec("bitsandbytes") is None:
            raise ValueError("`use_8bit_adam` needs bitsandbytes, which is not installed")
        for name in ("hub_model_id", "hub_token", "hub_private_repo", "hub_license"):
            if not self.push_to_hub and getattr(self, name):
                raise ValueError(f"`{name}` needs `push_to_hub`")
        if self.hub_strategy == "checkpoint" and not self.push_to_hub:
            raise ValueError("`hub_strategy` checkpoint needs `push_to_hub`")
        if self.hub_token and self.report_to not in ("none", "tensorboard"):
            raise ValueError(
                f"`hub_token` could be sent to {self.report_to} with the command line: use HF_TOKEN or `hf auth login`"
            )
        check_place(self.output_dir, self.resume_from_checkpoint)


@dataclass(kw_only=True)
class DistillationSettings(RunSettings):
    """teacher and student"""

    pretrained_model_name_or_path: str = setting(help="the teacher's pipeline: folder or Hub id")
    variant: str | None = setting(
        None,
        "the teacher's half-precision weights, where it has some; default: the ordinary ones",
        choices=tuple(VARIANTS),
    )
    dataset_config_name: str | None = setting(None, "of dataset_name, where it has several")
    dataset_split: str = setting("train", "of dataset_name")
    caption_column: str = setting("text", "of the prompts or captions; a text file has none")
    precompute_embeddings: str | None = setting(
        None,
        "embed every prompt once into this folder, or use what is there; the text encoder is not loaded for training",
        metavar="DIR",
    )
    max_sequence_length: int | None = setting(
        None, "tokens of a prompt; default: as the teacher's pipeline: 300 of Sana, 256 of SD3, 512 of others"
    )
    complex_human_instruction: bool = setting(True, "put Sana's instruction before every prompt, as its pipelines do")
    offload_text_encoder: bool = setting(False, "keep it on the CPU between prompts")
    resolution: int | None = setting(None, "pixels a side; default: the teacher's own")

    rank: int | None = setting(None, "train LoRA adapters of this rank on the teacher's own weights")
    lora_alpha: int | None = setting(None, "default: the rank")
    lora_target_modules: list[str] | None = setting(None, "layers by the end of their names; default: all large")
    merge_lora: bool = setting(False, "also save the pipeline with the adapters merged in")
    gradient_checkpointing: bool = setting(False, "keep the activations of one block at a time")
    compile: bool = setting(False, "torch.compile the blocks of teacher and student")
    export_variants: list[str] = setting([], "half-precision copies of the weights", choices=tuple(VARIANTS))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "max_sequence_length", "rank", "lora_alpha")
        for name in ("lora_alpha", "lora_target_modules", "merge_lora"):
            if self.rank is None and getattr(self, name):
                raise ValueError(f"`{name}` needs `rank`")
        if self.lora_alpha is None:
            self.lora_alpha = self.rank
        check_not_output(self, "precompute_embeddings")
        if self.export_variants and self.rank is not None and not self.merge_lora:
            raise ValueError("`export_variants` are of a pipeline: with `rank` they need `merge_lora`")

    def describe(self) -> dict[str, object]:
        """Say of a method's own settings what the model card is to show, by name."""
        return {}


@dataclass(kw_only=True)
class RowSettings(DistillationSettings):
    """rows of a frozen teacher"""

    allow_plain_teacher: bool = setting(
        False,
        "train on a teacher that is not in dense time, for research: it is unstable",
    )
    guidance_scales: list[float] = setting([4.0, 4.5, 5.0], "one per prompt; a single one if the teacher is no Sana")
    teacher_batch_size: int | None = setting(
        None, "prompts per process that the teacher runs on at once; default: train_batch_size"
    )
    replay_buffer_size: int = setting(
        0, "prompts per process whose rows are kept, and drawn from at random; 0: one batch, used once"
    )
    replay_steps: int = setting(1, "backward passes per batch of the teacher's")
    stochastic_sampling: bool = setting(True, "take fresh noise between the student's steps, not what it predicts")
    intermediate_timesteps: list[float] | None = setting(
        None, "radians between pi/2 and 0: the later steps of a student drawn in so many and one"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.guidance_scales) <= 0:
            raise ValueError(f"`guidance_scales` is {self.guidance_scales}: every scale has to be positive")
        if self.teacher_batch_size is None:
            self.teacher_batch_size = self.train_batch_size
        check_positive(self, "teacher_batch_size", "replay_steps")
        check_not_negative(self, "replay_buffer_size")
        for name in ("replay_buffer_size", "teacher_batch_size"):
            if getattr(self, name) % self.train_batch_size:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}: it has to be a multiple of `train_batch_size`"
                    f" {self.train_batch_size}"
                )
        if self.replay_steps > 1 and self.replay_buffer_size <= self.train_batch_size:
            raise ValueError(
                f"`replay_steps` is {self.replay_steps}, which trains on the same rows {self.replay_steps} times in a"
                " row unless `replay_buffer_size` holds more prompts than one batch"
            )
        if as_schedule([MAX_TIMESTEP, *(self.intermediate_timesteps or []), 0.0]) is None:
            raise ValueError(
                f"`intermediate_timesteps` is {self.intermediate_timesteps}: it has to descend between pi/2 and 0, in"
                " float32"
            )
        if self.rank is not None:
            self.check_stock_sampling("is of a student's own pipeline, and `rank` makes adapters for its teacher's")

    def check_stock_sampling(self, reason: str) -> None:
        """Refuse settings of a `TBCMScheduler`'s steps where a student has none.

        Args:
            reason: why it has none, for the message.

        Raises:
            ValueError: naming the setting that differs from its default.
        """
        for name, default in (("stochastic_sampling", True), ("intermediate_timesteps", None)):
            if getattr(self, name) != default:
                raise ValueError(f"`{name}` {reason}: leave it out")

    def describe(self) -> dict[str, object]:
        """What the model card says of the rows."""
        replay = f"{self.replay_buffer_size} prompts, {self.replay_steps} steps a recording"
        return {
            "replay": replay if self.replay_buffer_size else "off",
            "guidance scales": ", ".join(f"{scale:g}" for scale in self.guidance_scales),
        }


@dataclass(kw_only=True)
class PromptSettings(DistillationSettings):
    """prompts"""

    prompts_file: str | None = setting(None, "UTF-8 text, one prompt a line, or jsonl, csv, parquet")
    dataset_name: str | None = setting(None, "instead of a file: a `datasets` Hub id or folder")
    streaming: bool = setting(False, "read the data set as it comes, to max_prompts")
    max_prompts: int | None = setting(None, "read no more prompts than this")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompts_file is None) == (self.dataset_name is None):
            raise ValueError("give either `prompts_file` or `dataset_name`")
        if self.streaming and self.dataset_name is None:
            raise ValueError("`streaming` is for `dataset_name`")
        check_positive(self, "max_prompts")

    def load_prompts(self) -> PromptList:
        """Read the prompts to train on."""
        return load_prompts(
            self.prompts_file or str(self.dataset_name),
            config=self.dataset_config_name,
            split=self.dataset_split,
            column=self.caption_column,
            streaming=self.streaming,
            max_prompts=self.max_prompts,
        )


@dataclass(kw_only=True)
class PictureSettings(RowSettings):
    """pictures"""

    train_data_dir: str | None = setting(None, "folder of pictures with a metadata.jsonl of captions")
    dataset_name: str | None = setting(None, "instead of a folder: a `datasets` Hub id")
    image_column: str = setting("image", "of dataset_name")
    max_train_samples: int | None = setting(None, "use no more pictures than this")
    latents_cache: str | None = setting(
        None,
        "the pictures' latents, encoded once, or used from there; default: latents/ in output_dir",
        metavar="DIR",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("give either `train_data_dir` or `dataset_name`")
        if self.train_data_dir is not None and not Path(self.train_data_dir).is_dir():
            raise ValueError(f"`train_data_dir` is {self.train_data_dir}: there is no such folder")
        if self.train_data_dir is not None and Path(self.output_dir).resolve().is_relative_to(
            Path(self.train_data_dir).resolve()
        ):
            raise ValueError(
                f"`output_dir` {self.output_dir!r} lies in `train_data_dir`, whose folders are all read for pictures:"
                " choose another place"
            )
        check_not_output(self, "latents_cache")
        check_positive(self, "max_train_samples")

    def load_pictures(self) -> CaptionedImages:
        """Read the pictures to train on, and their captions."""
        return CaptionedImages(
            self.train_data_dir or str(self.dataset_name),
            config=self.dataset_config_name,
            split=self.dataset_split,
            image_column=self.image_column,
            caption_column=self.caption_column,
            max_images=self.max_train_samples,
        )


def parse_settings(settings: type[S], argv: Sequence[str] | None = None, *, description: str | None = None) -> S:
    """Read settings from a command line.

    Args:
        settings: their class; it and each of its bases is a group of flags, its docstring the group's title.
        argv: the arguments; the program's own by default.
        description: of the program.

    Returns:
        The settings, checked.

    Raises:
        SystemExit: with code 2, where they do not fit; the message names the flag.
    """
    groups = list(_groups(settings))
    parser = SettingsParser(groups, description=description)
    for field in (field for group in groups for field in dataclasses.fields(group)):
        if field.default is True:  # as argparse's BooleanOptionalAction spells it
            says = field.metadata["help"]
            parser.add_argument(f"--no-{field.name}", action="store_false", dest=field.name, help=says)
    values: dict[str, Any] = {}
    *parts, unknown = parser.parse_args_into_dataclasses(
        None if argv is None else list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for part in parts:
        values |= vars(part)
    if values.get("hub_token") and os.environ.keys() & LAUNCHED:
        parser.error(
            "--hub_token is on the launcher's command line, which it prints where a run fails and process lists show:"
            " set HF_TOKEN or run `hf auth login` in its place, and make a new token, as this one has been shown"
        )
    try:
        return settings(**values)
    except (ValueError, OSError) as error:
        parser.error(name_flags(in_a_line(error), flags_of(settings)))


def flags_of(settings: type[RunSettings]) -> dict[str, str]:
    """Give the flag of every setting, by its name."""
    return {field.name: f"--{field.name}" for field in dataclasses.fields(settings)}


def _groups(settings: type) -> Iterator[type]:
    """A dataclass of what each class adds to its bases; what it gives another default stands with it alone."""
    taken: set[str] = set()
    for part in settings.__mro__:
        if dataclasses.is_dataclass(part):
            own = [name for name in inspect.get_annotations(part) if name not in taken]
            taken |= {*own}
            yield _group(part, own)


def _group(part: type, names: Sequence[str]) -> type:
    hints = get_type_hints(part)
    own = [field for field in dataclasses.fields(part) if field.name in names]
    copies = [
        (
            field.name,
            hints[field.name],
            dataclasses.field(default=field.default, metadata=field.metadata)
            if field.default_factory is dataclasses.MISSING
            else dataclasses.field(default_factory=field.default_factory, metadata=field.metadata),
        )
        for field in own
    ]
    title = (part.__doc__ or part.__name__).strip()
    return dataclasses.make_dataclass(part.__name__, copies, kw_only=True, namespace={"_argument_group_name": title})


class SettingsParser(CommandParser, HfArgumentParser):
    """Makes flags of dataclasses."""
