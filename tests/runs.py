"""Starting the training scripts as users do, or forked in a fraction of the time, and comparing what they leave."""

import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from shard_on_cpu import shard_on_cpu
from torch.multiprocessing import ProcessExitedException

from diffusers_tbcm.training.run import Run


SCRIPTS = Path(__file__).parents[1] / "examples" / "tbcm"
UNWRITTEN = "could not be written"
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
# What `accelerate config` writes for FSDP2, as the environment that `accelerate launch` makes of it.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "SanaTransformerBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def metrics(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def training_state(checkpoint):
    """Every tensor of a checkpoint: the trained network, the optimiser with its learning rate, and the EMA."""

    def flatten(value, name):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from flatten(item, f"{name}.{key}")
        elif isinstance(value, int | float):
            yield name, torch.tensor(value, dtype=torch.float64)

    tensors = load_file(checkpoint / "model.safetensors") | dict(
        flatten(torch.load(checkpoint / "optimizer.bin", weights_only=True), "optimizer")
    )
    tensors |= flatten(load_file(checkpoint / "ema.safetensors"), "ema")
    return tensors | dict(flatten(json.loads((checkpoint / "run.json").read_text())["averaged_steps"], "ema steps"))


def assert_same_state(actual, expected):
    actual, expected = training_state(actual), training_state(expected)
    assert actual.keys() == expected.keys() and len(actual) > 100
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def assert_same_models(broken, whole):
    """Checkpoints hold the same student, critic, average and optimisers, bit for bit."""
    for name in ("model.safetensors", "model_1.safetensors", "ema.safetensors"):
        expected, actual = load_file(whole / name), load_file(broken / name)
        assert len(expected) > 20 and all(torch.equal(actual[key], expected[key]) for key in expected)
    for name in ("optimizer.bin", "optimizer_1.bin"):
        expected, actual = (torch.load(folder / name, weights_only=True)["state"] for folder in (whole, broken))
        assert len(expected) > 20
        assert all(torch.equal(actual[key][part], expected[key][part]) for key in expected for part in expected[key])


def fork(number, function, *arguments):
    """Call a function in processes of its own that have imported what this one has: gives none of that anew.

    Args:
        number: of processes, each of which gets its rank as the first argument.
        function: what they do; an error in one of them is raised here, with its traceback.
        arguments: the others.
    """
    started = torch.multiprocessing.start_processes(
        _in_one_thread, (function, *arguments), number, join=False, daemon=True, start_method="fork"
    )
    deadline = time.monotonic() + 600
    while not started.join(timeout=1, grace_period=30):
        assert time.monotonic() < deadline, "a process hangs"


def _in_one_thread(rank, function, *arguments):
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    AcceleratorState._reset_state(reset_partial_state=True)
    function(rank, *arguments)


def run_forked(command, check):
    """`subprocess.run` of a Python script, or of a module, forked."""
    assert check and command[0] == sys.executable
    fork(1, _run_python, command[1:])


def _run_python(_, arguments):
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")


def kill_after_updates(number, main, arguments):
    """Start a script's `main` and kill it, as the kernel does, after so many calls of `Run.update`."""
    with pytest.raises(ProcessExitedException) as ended:
        fork(1, _die_after_updates, number, main, arguments)
    assert ended.value.exit_code == -signal.SIGKILL


def _die_after_updates(_, number, main, arguments):
    update, calls = Run.update, []

    def update_and_die(self, *args, **kwargs):
        update(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.update = update_and_die
    main(arguments)


def run_until(arguments, folder, step, number):
    """Start the script, send it a signal once it has logged a step, give its exit code and what it printed."""
    command = [sys.executable, str(SCRIPTS / "train_tbcm_distill.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in metrics(folder)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(arguments, *wrappers, script=SCRIPTS / "train_tbcm_distill.py", nodes=1, **environment):
    """Two processes of one launcher, or two launchers that meet over loopback, of one process each.

    `accelerate launch` itself starts several on a CPU only by MPI.
    """
    command = [sys.executable, "-m", "torch.distributed.run"]
    environment = os.environ | CPU | environment
    if nodes == 1:
        launchers = [[*command, "--standalone", "--nproc_per_node", "2"]]
    else:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
        meeting += ["--master_port", str(free_port())]
        launchers = [[*command, *meeting, "--node_rank", str(rank)] for rank in range(2)]
    started = [
        subprocess.Popen(
            [*launcher, *map(str, wrappers), str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for launcher in launchers
    ]
    for process in started:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0 and UNWRITTEN not in output, output[-5000:]


def launch_sharded(arguments):
    """Two processes that share every weight by FSDP2."""
    launch(arguments, Path(__file__).with_name("shard_on_cpu.py"), **FSDP2)


def fork_two(main, arguments, *, sharded=False, **environment):
    """Two processes as `launch` and `launch_sharded` start them, forked: a tenth of the time.

    Args:
        main: of the script.
        arguments: its command line.
        sharded: whether they share every weight by FSDP2.
        environment: variables that are other than there.
    """
    fork(2, _run_rank, free_port(), main, arguments, sharded, environment)


def _run_rank(rank, port, main, arguments, sharded, environment):
    os.environ |= CPU | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sharded:
        os.environ |= FSDP2 | environment
        shard_on_cpu()
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logging.getLogger("diffusers_tbcm").addHandler(handler)
    main(arguments)
    assert not [record for record in records if UNWRITTEN in record.getMessage()]


def largest_relative_difference(actual, expected):
    """Over all tensors, the norm of the difference over the norm."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - value).norm() / value.norm()) for name, value in expected.items() if value.any())
