"""The scripts of `examples/tbcm`, for `accelerate launch -m diffusers_tbcm.scripts.train_tbcm_distill`.

They lie beside this file in an installed package, and in their own folder in a checkout.
"""

from pathlib import Path


_CHECKOUT = Path(__file__).parents[3] / "examples" / "tbcm"

if _CHECKOUT.is_dir():
    __path__.append(str(_CHECKOUT))
