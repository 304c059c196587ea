"""Distil a flow-matching text-to-image pipeline into a 1-4 step one without images (TBCM, arXiv 2511.20410)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .pipeline_sana_tbcm import SanaTBCMPipeline
    from .scheduling_tbcm import TBCMScheduler


__version__ = "0.1.0"
__all__ = ["SanaTBCMPipeline", "TBCMScheduler", "__version__"]

_MODULES = {"SanaTBCMPipeline": "pipeline_sana_tbcm", "TBCMScheduler": "scheduling_tbcm"}


def __getattr__(name: str) -> Any:
    """Import a class when it is asked for: torch and diffusers take seconds, which `--help` need not wait for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
