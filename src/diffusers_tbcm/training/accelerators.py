"""The launches that are tested, and those that are refused."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, gather_object, get_int_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..errors import EndedElsewhere, in_a_line


# Where launchers say how many processes they have started: torchrun and those of MPI
WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


def check_processes(accelerator: Accelerator) -> None:
    """Refuse processes that were started together and do not know of each other: each would be a run of its own.

    Args:
        accelerator: of this process.

    Raises:
        ValueError: where accelerate has not joined them, as it does not on a machine without a GPU.
    """
    started = get_int_from_env(WORLD_SIZES, 1)
    if started > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"{started} processes were started and accelerate has not joined them, as on a machine without a GPU: each"
            " would be a run of its own. Start them with"
            f" `ACCELERATE_USE_CPU=true torchrun --nproc_per_node {started}`"
        )


def check_launch(accelerator: Accelerator, report_to: str, *, num_models: int = 1, shards: bool = True) -> None:
    """Refuse a launch that is not tested.

    Args:
        accelerator: the run's.
        report_to: an accelerate tracker, or "none".
        num_models: how many models are trained.
        shards: whether FSDP2 may shard them.

    Raises:
        ValueError: naming the configuration, or the setting.
    """
    check_processes(accelerator)
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP) and not accelerator.is_fsdp2:
        raise ValueError(
            f"this accelerate configuration is {accelerator.distributed_type.value}: the tangent's forward-mode"
            " derivative is tested with one process, DDP and FSDP2 (fsdp_version: 2)"
        )
    if accelerator.is_fsdp2 and not shards:
        raise ValueError("this method is tested with one process and DDP, and this is FSDP2: use DDP")
    if num_models > 1 and accelerator.mixed_precision == "fp16":
        raise ValueError("`mixed_precision` is fp16, whose loss scale two optimisers cannot share: use bf16 or no")
    if report_to != "none" and report_to not in map(str, get_available_trackers()):
        raise ValueError(f"`report_to` is {report_to!r}, which is not installed or no tracker of accelerate")


@contextmanager
def ending_together(accelerator: Accelerator) -> Iterator[None]:
    """Let no process wait for one that has failed in the block: they leave it together.

    The block must not wait for other processes itself.

    Args:
        accelerator: of the run; every process enters the block.

    Raises:
        Exception: what has failed in this process, where no process before it says the same.
        EndedElsewhere: where another process has failed, and says why.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    words = None if failure is None else in_a_line(failure)
    said = [words] if accelerator.num_processes == 1 else gather_object([words])
    if failure is not None and said.index(words) == accelerator.process_index:
        raise failure
    if any(word is not None for word in said):
        raise EndedElsewhere("another process has failed, and says why")


def keep_whole_states(accelerator: Accelerator) -> None:
    """Let FSDP2's checkpoints hold whole tensors: torch unpickles the index of sharded ones, which may run code.

    Args:
        accelerator: the run's.
    """
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of what the launch asked for
        plugin.set_state_dict_type("FULL_STATE_DICT")


def shard_again(model: nn.Module) -> None:
    """Let every process hold its shards alone: after a pass without gradient FSDP2 leaves some weights whole.

    Args:
        model: any; one that is not sharded stays as it is.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
