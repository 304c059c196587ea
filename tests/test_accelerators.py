from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from diffusers_tbcm.errors import EndedElsewhere
from diffusers_tbcm.training import accelerators
from diffusers_tbcm.training.accelerators import WORLD_SIZES, check_launch, check_processes, ending_together


@pytest.mark.parametrize("variable", WORLD_SIZES)
def test_processes_that_do_not_know_of_each_other_are_refused(variable, monkeypatch):
    for name in WORLD_SIZES:
        monkeypatch.delenv(name, raising=False)
    alone = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO, is_fsdp2=False, mixed_precision="no")
    check_launch(alone, "none")
    monkeypatch.setenv(variable, "2")
    for check in (check_processes, lambda accelerator: check_launch(accelerator, "none")):
        with pytest.raises(ValueError, match=r"2 processes were started .* `ACCELERATE_USE_CPU=true torchrun"):
            check(alone)
    check_processes(SimpleNamespace(num_processes=2))


@pytest.mark.parametrize(
    ("said", "own", "rank", "ends_in"),
    [
        ([None, None], None, 1, None),
        (["full", None], "full", 0, OSError),
        (["full", None], None, 1, EndedElsewhere),
        (["full", "full"], "full", 1, EndedElsewhere),  # said once
        (["full", "other"], "other", 1, OSError),
        ([None, "full"], None, 0, EndedElsewhere),
    ],
)
def test_processes_end_together_and_say_once_why(said, own, rank, ends_in, monkeypatch):
    monkeypatch.setattr(accelerators, "gather_object", lambda words: said if words == [own] else [])
    process, ended = SimpleNamespace(num_processes=2, process_index=rank), None
    try:
        with ending_together(process):
            if own is not None:
                raise OSError(own)
    except Exception as error:
        ended = type(error)
    assert ended is ends_in


def test_one_process_ends_alone():
    alone = SimpleNamespace(num_processes=1, process_index=0)
    with ending_together(alone):
        pass
    with pytest.raises(ValueError, match="mine"), ending_together(alone):
        raise ValueError("mine")
