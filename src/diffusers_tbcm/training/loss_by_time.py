"""Which times a run trains at: the weight of its consistency loss and the logvar head's distance, by interval of t."""

from __future__ import annotations

import math

import torch
from accelerate.logging import get_logger

from ..loss import consistency_weight, loss_weight
from ..trajectory import reference_route
from .run import Run


logger = get_logger(__name__)

NUM_STEPS = 16  # of the paper's route, whose intervals these are
NUM_LARGE = 4  # intervals of large t: those above 1.43, which one-step sampling depends on most
DECAY = 0.99  # of the running sums, a step
FAR = 1.0  # of a logvar from its fixed point: the weight is wrong by a factor e


class LossByTime:
    """Running sums over rows, by the 15 intervals of the paper's route, from large t to small; over all processes.

    They reach back about 100 steps, not beyond a resumption, and change no weight. A step that is not finite does not
    count in them.

    Args:
        run: the run; its settings are of a script that has `loss_weighting`.
        weighting: of the loss, one of `loss.LOSS_WEIGHTINGS`.

    Attributes:
        edges: where the intervals begin and end, radians, (16,), descending from pi/2 to 0.
    """

    def __init__(self, run: Run, weighting: str) -> None:
        self._run, self._weighting = run, weighting
        self.edges = torch.cat([reference_route(NUM_STEPS)[:-1], torch.zeros(1)])
        self._inner = self.edges[1:-1].flip(0).to(run.device)
        # By interval: rows, and their summed weight, error and logvar - log w(t).
        self._step, self._sums = (torch.zeros(4, NUM_STEPS - 1, device=run.device) for _ in range(2))
        self._noted = False

    @torch.no_grad()
    def note(self, timesteps: torch.Tensor, error: torch.Tensor, logvar: torch.Tensor) -> None:
        """Add the rows of a micro-step.

        Args:
            timesteps: t in radians in (0, pi/2), (rows,).
            error: of `loss.consistency_error`, (rows,).
            logvar: of the rows, (rows,).
        """
        self._noted = True
        if not self._run.has_rows:
            return
        weight = loss_weight(timesteps, logvar, self._weighting)
        excess = logvar - consistency_weight(timesteps).log()
        values = torch.stack([torch.ones_like(weight), weight, error, excess]).float()
        interval = NUM_STEPS - 2 - torch.bucketize(timesteps, self._inner)
        self._step.index_add_(1, interval, values)

    @torch.no_grad()
    def log(self) -> None:
        """Take in a step, after its micro-steps; every process calls this. What it gives goes to the run's logs.

        `weight_shares` are the intervals' shares of the loss's weight over the rows drawn, (15,);
        `weight_share_large_t` is that of the first four, `weight_share_small_t` that of the last; and
        `logvar_distance`, of a learned weight, is the largest of `distances`.
        """
        if not self._noted:  # a step of another loss
            return
        self._noted = False
        step = self._run.accelerator.reduce(self._step)
        self._sums = torch.where(step.isfinite().all(), DECAY * self._sums + step, self._sums)
        self._step.zero_()
        shares = self.shares()
        self._run.log(
            weight_share_large_t=shares[:NUM_LARGE].sum(), weight_share_small_t=shares[-1], weight_shares=shares
        )
        if self._weighting == "learned":
            self._run.log(logvar_distance=self.distances().abs().nan_to_num().max())

    def shares(self) -> torch.Tensor:
        """Give the share of the loss's weight that each interval's rows have, (15,); NaN before the first row."""
        weight = self._sums[1]
        return weight / weight.sum()

    def distances(self) -> torch.Tensor:
        """Say how far the logvar of each interval lies above log(w(t) E[error]), which the loss draws it to.

        Returns:
            Differences of logarithms, (15,); NaN where an interval had no rows.
        """
        rows, _, error, excess = self._sums
        return excess / rows - (error / rows).log()

    def conclude(self) -> None:
        """Say at the end of training where the weight was, and warn of a logvar head that is far from convergence."""
        shares = self.shares().tolist()
        if math.isnan(shares[0]):
            return
        edges = self.edges.tolist()
        self._run.say(
            f"Share of the loss's weight: {sum(shares[:NUM_LARGE]):.1%} at t above {edges[NUM_LARGE]:.2f},"
            f" {shares[-1]:.1%} below {edges[-2]:.2f}"
        )
        if self._weighting != "learned" or self._run.settings.dry_run:
            return
        distances = self.distances().nan_to_num().tolist()
        worst = max(range(len(distances)), key=lambda interval: abs(distances[interval]))
        if abs(distances[worst]) > FAR:
            side = "above" if distances[worst] > 0 else "below"
            logger.warning(
                f"The learned loss weight has not converged: at t from {edges[worst + 1]:.2f} to {edges[worst]:.2f}"
                f" logvar is {abs(distances[worst]):.1f} {side} its fixed point log(w(t) E[error]); train with"
                " `loss_weighting` uniform, or for many more steps"
            )
