"""Where pytest-xdist runs the tests over processes, each computes in one thread, and so does what it starts."""

import os


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported
