"""What a run reports: a JSON Lines file of its own, and the trackers of accelerate; neither can end the run."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers.utils import logging
from PIL import Image

from .run_folder import cut_log


logger = logging.get_logger(__name__)


class MetricsLog:
    """Sends metrics to a file, one JSON object a line, and to every tracker of an accelerator.

    Args:
        accelerator: holds the trackers; only its main process writes.
        path: the file, continued where it exists. Values that are not finite are null in it.
        first_step: lines of later steps are left over from a run that stopped after its last checkpoint; they, and
            torn ones, are moved to `abandoned/`.
    """

    def __init__(self, accelerator: Accelerator, path: str | PathLike[str], first_step: int = 0) -> None:
        self.accelerator = accelerator
        self.path = Path(path)
        if accelerator.is_main_process:
            try:
                cut_log(self.path, first_step)
            except OSError as error:
                logger.warning(f"{self.path} keeps lines after step {first_step}: {error}")

    def __call__(
        self, values: Mapping[str, float], step: int, *, vectors: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Report metrics; what fails is named in a warning, and a tracker that fails is left out from then on.

        Args:
            values: value by name.
            step: optimiser steps done.
            vectors: several values by name, for the file alone.
        """
        if not self.accelerator.is_main_process:
            return
        finite: dict[str, Any] = {name: _finite(value) for name, value in values.items()}
        finite |= {name: list(map(_finite, vector)) for name, vector in (vectors or {}).items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            logger.warning(f"{self.path} could not be written: {error}")
        self._try_trackers(lambda tracker: tracker.log(dict(values), step=step))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Send a picture to the trackers that show pictures.

        Args:
            name: the picture's name.
            image: the picture.
            step: optimiser steps done.
        """
        pixels = np.asarray(image)[None]

        def send(tracker: GeneralTracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: list(pixels)}, step=step)

        self._try_trackers(send)

    def _try_trackers(self, send: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                send(tracker)
            except Exception as error:  # whatever a tracker's service does, the run outlives it
                logger.warning(f"Tracker {tracker.name} failed and is left out from now on: {error!r}")
                self.accelerator.trackers.remove(tracker)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
