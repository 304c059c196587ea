"""What makes the whole suite quicker, and keeps it on the CPU."""

import gc
import os


os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a forked process cannot use a GPU that its parent has used
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores; torch reads it when it is imported


def pytest_collection_finish():
    gc.freeze()  # every training frees its memory, and need not look for it among all that was imported
