"""What makes the whole suite quicker."""

import gc
import os


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores; torch reads it when it is imported


def pytest_collection_finish():
    gc.freeze()  # every training frees its memory, and need not look for it among all that was imported
