"""Errors in words: which are a user's, and what names the file that a library cannot load."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from diffusers_tbcm.errors import MAX_LENGTH, EndedElsewhere, Failure, in_a_line, is_users, loading


@pytest.mark.parametrize(
    "error",
    [
        ValueError("`rank` is 0"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        PermissionError(errno.EROFS, "Read-only file system", "x"),
        ModuleNotFoundError("No module named 'datasets'"),
        SafetensorError("header too large"),
        Failure("the Hub refused the push"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        MemoryError(),
        EndedElsewhere("another process has failed"),
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5031"),
    ],
)
def test_what_a_user_can_change_is_no_bug(error):
    assert is_users(error)


@pytest.mark.parametrize(
    "error",
    [AssertionError(), TypeError("draw() got 2"), KeyError("x"), AttributeError("x"), RuntimeError("shapes differ")],
)
def test_a_bug_is_none_of_the_users(error):
    assert not is_users(error)


def test_a_message_is_one_line_of_bounded_length():
    assert in_a_line(ValueError("first\n    second")) == "first second"
    assert in_a_line(KeyError("key")) == "KeyError 'key'" and in_a_line(MemoryError()) == "MemoryError"
    assert len(in_a_line(RuntimeError("weight " * 1000))) == MAX_LENGTH + len(" ...")


def test_loading_names_the_file_and_keeps_the_cause():
    with (
        pytest.raises(ValueError, match=r"^model 'm' cannot be loaded: KeyError 'x'$") as raised,
        loading("model", "m"),
    ):
        raise KeyError("x")
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_loading_hides_no_lack_of_memory_and_no_interruption(error):
    with pytest.raises(type(error)), loading("model", "m"):
        raise error


def test_loading_lets_pass_what_it_is_told_to():
    with pytest.raises(OSError, match="gone"), loading("model", "m", but=OSError):
        raise OSError("gone")
