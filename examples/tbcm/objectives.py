"""What a method minimises on its rows: step 5 of the loop, and step 6 up to the backward pass."""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from diffusers import SanaTransformer2DModel

from diffusers_tbcm.discrete import HUBER_CONSTANT, LOSS_TYPES, discrete_loss, discrete_target
from diffusers_tbcm.loss import consistency_error, consistency_loss, endpoint_loss
from diffusers_tbcm.tangent import dual_inputs, normalized_tangent, tangent_ratio
from diffusers_tbcm.training.replay import TrainingRows
from diffusers_tbcm.trajectory import reference_route
from diffusers_tbcm.trigflow import TrigFlowTransformer


Measures = dict[str, torch.Tensor | float]  # what is logged, by name


class Objective:
    """A method's loss; called as (rows, step, draw) it gives the loss of a batch and what is logged of it.

    Args:
        args: the flags.
        accelerator: the run's.
        model: the prepared student and its logvar head, giving F and the log-variance.
        teacher: the frozen network F.
        sigma_data: standard deviation of the latents.
    """

    # What a method trains beside the student, and how: prepared, clipped and stepped together with it.
    modules: Sequence[torch.nn.Module] = ()
    optimizers: Sequence[torch.optim.Optimizer] = ()

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: torch.nn.Module,
        teacher: TrigFlowTransformer,
        *,
        sigma_data: float,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.model = model
        self.teacher = teacher
        self.sigma_data = sigma_data

    @staticmethod
    def check_run(args: argparse.Namespace, accelerator: Accelerator, teacher: SanaTransformer2DModel) -> None:
        """Refuse a launch or a teacher that the method cannot train with."""


class ConsistencyObjective(Objective):
    """Continuous-time consistency, sCM's: the ratio r warms up to 1 and stays there."""

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        tangent = parser.add_argument_group("tangent")
        tangent.add_argument("--tangent_warmup_steps", type=int, default=4000)
        tangent.add_argument(
            "--tangent_resolution_invariant", action="store_true", help="norm over the root of its size"
        )

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        if args.tangent_warmup_steps < 0:
            parser.error(f"--tangent_warmup_steps is {args.tangent_warmup_steps}: it must not be negative")

    @staticmethod
    def describe(args: argparse.Namespace) -> dict[str, object]:
        """What the model card says of the objective."""
        return {"tangent ratio": f"warm-up {args.tangent_warmup_steps}"}

    def ratio(self, step: int) -> float:
        return tangent_ratio(step, self.args.tangent_warmup_steps, None, 0, 1.0)

    def __call__(self, rows: TrainingRows, step: int, draw: int) -> tuple[torch.Tensor, Measures]:
        loss, measures, _ = self.consistency(rows, step)
        return loss, measures

    def consistency(self, rows: TrainingRows, step: int) -> tuple[torch.Tensor, Measures, torch.Tensor]:
        """The loss, what is logged, and F of the student with gradient."""
        # 5. The student, and its tangent in the same pass
        sample, timesteps = dual_inputs(rows.latents, rows.velocity, rows.timesteps, self.sigma_data)
        trig_output, logvar = self.model(
            sample, timesteps, rows.prompt_embeds, rows.prompt_attention_mask, rows.guidance_scale
        )
        ratio = self.ratio(step)
        tangent = normalized_tangent(
            trig_output,
            rows.latents,
            rows.velocity,
            rows.timesteps,
            ratio=ratio,
            sigma_data=self.sigma_data,
            resolution_invariant=self.args.tangent_resolution_invariant,
        )

        # 6. Loss
        student = (trig_output.primal, tangent.trig_output, tangent.tangent)
        loss = consistency_loss(*student, logvar, rows.timesteps, self.sigma_data)
        with torch.no_grad():
            error = consistency_error(*student).mean()
        measures = {"error": error, "tangent_norm": tangent.norm.mean(), "tangent_ratio": ratio}
        return loss, measures, trig_output.primal


class TBCMObjective(ConsistencyObjective):
    """The paper's: r warms up, stays, and cools down; optionally after an endpoint warm-up."""

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        ConsistencyObjective.add_flags(parser)
        more = parser.add_argument_group("cooldown and endpoint warm-up")
        more.add_argument("--tangent_cooldown_start_step", type=int, default=15000, help="-1: no cooldown")
        more.add_argument("--tangent_cooldown_steps", type=int, default=2000)
        more.add_argument("--tangent_final_ratio", type=float, default=0.75)
        more.add_argument(
            "--endpoint_warmup_steps",
            type=int,
            default=0,
            help="first train every row to lead to its trajectory's end (ODE initialisation; not in the paper)",
        )

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        if args.endpoint_warmup_steps < 0:
            parser.error(f"--endpoint_warmup_steps is {args.endpoint_warmup_steps}: it must not be negative")
        if args.tangent_cooldown_start_step < 0:
            args.tangent_cooldown_start_step = None
        try:
            tangent_ratio(
                0,
                args.tangent_warmup_steps,
                args.tangent_cooldown_start_step,
                args.tangent_cooldown_steps,
                args.tangent_final_ratio,
            )
        except ValueError as error:
            parser.error(f"--tangent_*: {error}")

    @staticmethod
    def describe(args: argparse.Namespace) -> dict[str, object]:
        cooldown = (
            "no cooldown"
            if args.tangent_cooldown_start_step is None
            else f"cooldown from step {args.tangent_cooldown_start_step} over {args.tangent_cooldown_steps}"
        )
        return {
            "tangent ratio": f"warm-up {args.tangent_warmup_steps}, {cooldown}, final {args.tangent_final_ratio}",
            "endpoint warm-up": f"{args.endpoint_warmup_steps} steps" if args.endpoint_warmup_steps else "off",
        }

    def ratio(self, step: int) -> float:
        args = self.args
        return tangent_ratio(
            step,
            args.tangent_warmup_steps,
            args.tangent_cooldown_start_step,
            args.tangent_cooldown_steps,
            args.tangent_final_ratio,
        )

    def __call__(self, rows: TrainingRows, step: int, draw: int) -> tuple[torch.Tensor, Measures]:
        if step >= self.args.endpoint_warmup_steps:
            return super().__call__(rows, step, draw)
        sample = rows.latents / self.sigma_data
        trig_output, logvar = self.model(
            sample, rows.timesteps, rows.prompt_embeds, rows.prompt_attention_mask, rows.guidance_scale
        )
        loss = endpoint_loss(trig_output, rows.latents, rows.pred_original_sample, rows.timesteps, self.sigma_data)
        return loss + 0 * logvar.sum(), {}  # DDP waits for the gradient of every parameter


class DiscreteObjective(Objective):
    """LCM's: predictions at neighbouring times of a grid are to agree; the target is the student, without gradient."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: torch.nn.Module,
        teacher: TrigFlowTransformer,
        *,
        sigma_data: float,
    ) -> None:
        super().__init__(args, accelerator, model, teacher, sigma_data=sigma_data)
        route = reference_route(args.num_ddim_timesteps, args.flow_shift)
        self.grid = torch.cat([route, route.new_zeros(1)]).to(accelerator.device)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        loss = parser.add_argument_group("loss")
        loss.add_argument("--loss_type", choices=LOSS_TYPES, default="huber")
        loss.add_argument("--huber_c", type=float, default=HUBER_CONSTANT, help="of the pseudo-Huber loss")

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        if not args.huber_c > 0:
            parser.error(f"--huber_c is {args.huber_c}: it has to be positive")

    @staticmethod
    def describe(args: argparse.Namespace) -> dict[str, object]:
        return {"loss": f"huber, c {args.huber_c:g}" if args.loss_type == "huber" else args.loss_type}

    def __call__(self, rows: TrainingRows, step: int, draw: int) -> tuple[torch.Tensor, Measures]:
        # 5. The student at both ends of an interval, at the earlier one without gradient
        later = rows.timesteps.unsqueeze(1)
        next_timesteps = self.grid.expand(len(rows), -1).where(self.grid < later, 0).amax(1)
        target = discrete_target(lambda *inputs: self.model(*inputs)[0], rows, next_timesteps, self.sigma_data)
        trig_output, logvar = self.model(
            rows.latents / self.sigma_data,
            rows.timesteps,
            rows.prompt_embeds,
            rows.prompt_attention_mask,
            rows.guidance_scale,
        )

        # 6. Loss
        loss = discrete_loss(
            trig_output,
            rows.latents,
            target,
            rows.timesteps,
            loss_type=self.args.loss_type,
            huber_constant=self.args.huber_c,
            sigma_data=self.sigma_data,
        )
        return loss + 0 * logvar.sum(), {}  # DDP waits for the gradient of every parameter
