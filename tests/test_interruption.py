"""A request to stop is noted, once, and the old behaviour comes back."""

import os
import signal

import pytest

from diffusers_tbcm.training.interruption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    received = []
    before = signal.signal(number, lambda *_: received.append("as before"))
    try:
        with StopRequest() as stop:
            assert not stop.received
            os.kill(os.getpid(), number)
            assert stop.received and received == []
            os.kill(os.getpid(), number)
            assert received == ["as before"]
        with StopRequest() as stop:
            pass
        os.kill(os.getpid(), number)
        assert not stop.received and received == ["as before"] * 2
    finally:
        signal.signal(number, before)
