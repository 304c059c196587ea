from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from diffusers_tbcm.training.accelerators import WORLD_SIZES, check_launch, check_processes


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
