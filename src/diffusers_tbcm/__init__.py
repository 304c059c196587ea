"""Distil a flow-matching text-to-image pipeline into a 1-4 step one without images (TBCM, arXiv 2511.20410)."""

from .pipeline_sana_tbcm import SanaTBCMPipeline
from .scheduling_tbcm import TBCMScheduler


__version__ = "0.1.0"
__all__ = ["SanaTBCMPipeline", "TBCMScheduler", "__version__"]
