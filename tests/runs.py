"""Starting the training scripts as users do, and comparing what they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file


SCRIPTS = Path(__file__).parents[1] / "examples" / "tbcm"
# What `accelerate config` writes for FSDP2, as the environment that `accelerate launch` makes of it.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "SanaTransformerBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
# accelerate shards on accelerators only: this lets it do so on a CPU, with everything else as it is.
SHARD_ON_CPU = """
import runpy, sys
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
import diffusers_tbcm.training.averaging as averaging

initialise, plugins = AcceleratorState.__init__, []

def initialise_sharded(self, *args, fsdp_plugin=None, **kwargs):
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugins.extend([fsdp_plugin] if fsdp_plugin is not None else [])
    if plugins:  # the state is made anew, from the processes' own, wherever accelerate asks for it
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]

AcceleratorState.__init__ = initialise_sharded
full_weights = averaging.ShardedEMA.full_weights

def full_weights_of_shards(self):
    assert all(isinstance(weight, DTensor) for weight in self.shadow_params)
    return full_weights(self)

averaging.ShardedEMA.full_weights = full_weights_of_shards
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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


# Kills the process, as the kernel does, after so many updates of a run.
KILLED_AT_AN_UPDATE = """
import os, runpy, signal, sys
from diffusers_tbcm.training.run import Run

update, calls = Run.update, []

def update_and_die(self, *args, **kwargs):
    update(self, *args, **kwargs)
    calls.append(None)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)

Run.update = update_and_die
number, sys.argv = int(sys.argv[1]), sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_after_updates(number, arguments, script):
    """Start a script and kill it with signal 9 after so many calls of `Run.update`."""
    command = [sys.executable, "-c", KILLED_AT_AN_UPDATE, str(number), str(script), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-5000:]


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
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
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
        assert process.returncode == 0 and "could not be written" not in output, output[-5000:]


def launch_sharded(arguments, script=SCRIPTS / "train_tbcm_distill.py"):
    """Two processes that share every weight by FSDP2."""
    with TemporaryDirectory() as folder:
        launcher = Path(folder) / "shard_on_cpu.py"
        launcher.write_text(SHARD_ON_CPU)
        launch(arguments, launcher, script=script, **FSDP2)


def largest_relative_difference(actual, expected):
    """Over all tensors, the norm of the difference over the norm."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - value).norm() / value.norm()) for name, value in expected.items() if value.any())
