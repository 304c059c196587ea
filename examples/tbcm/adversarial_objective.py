"""Sana-Sprint's objective: sCM's loss and, beside the student, a discriminator that is trained with it."""

import argparse

import torch
from accelerate import Accelerator
from diffusers import SanaTransformer2DModel
from distill_setup import build_optimizer
from objectives import ConsistencyObjective, Measures

from diffusers_tbcm.adversarial import (
    DiscriminatorHeads,
    block_features,
    frozen_verdicts,
    head_blocks,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from diffusers_tbcm.data.prompts import draw_generator
from diffusers_tbcm.diffusion import diffuse, sample_diffusion_timesteps
from diffusers_tbcm.training.replay import TrainingRows
from diffusers_tbcm.transfer import to_device
from diffusers_tbcm.trigflow import TrigFlowTransformer, consistency_output


class AdversarialObjective(ConsistencyObjective):
    """Sana-Sprint's: sCM's loss, and heads on the frozen teacher's blocks that judge what the student predicts.

    Every step updates both sides, each against the other as it was before: the student by the verdicts of the heads,
    and the heads by the predictions that the student has just made on the same batch, without its gradient. The
    reference's script alternates as well, but spends a batch, a step of its count and another forward of the student
    on each side: n steps here are 2 n there.
    """

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
        if args.gradient_checkpointing:  # of the pass through which the verdicts reach the student
            teacher.transformer.enable_gradient_checkpointing()
        config = teacher.transformer.config
        blocks = head_blocks(config.num_layers, args.head_block_ids)
        heads = DiscriminatorHeads(config.num_attention_heads * config.attention_head_dim, blocks)
        rate = args.learning_rate if args.discriminator_learning_rate is None else args.discriminator_learning_rate
        self.heads, optimizer = accelerator.prepare(heads, build_optimizer(args, list(heads.parameters()), rate))
        self.modules, self.optimizers = (self.heads,), (optimizer,)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        ConsistencyObjective.add_flags(parser)
        adversary = parser.add_argument_group("discriminator")
        adversary.add_argument("--scm_lambda", type=float, default=1.0, help="weight of the consistency loss")
        adversary.add_argument("--adv_lambda", type=float, default=0.5, help="weight of the adversarial loss")
        adversary.add_argument(
            "--discriminator_learning_rate", type=float, help="constant; default: --learning_rate before its schedule"
        )
        adversary.add_argument(
            "--head_block_ids",
            type=int,
            nargs="+",
            help="the teacher's blocks that get a head; default: 2 8 14 19, closer in a smaller teacher",
        )
        adversary.add_argument("--logit_mean_discriminator", type=float, default=-0.6, help="of the times to judge at")
        adversary.add_argument("--logit_std_discriminator", type=float, default=1.0, help="of the times to judge at")
        adversary.add_argument(
            "--train_largest_timestep",
            action="store_true",
            help="judge predictions from other noise and times, the largest among them, by a second forward",
        )
        adversary.add_argument("--largest_timestep_prob", type=float, default=0.5, help="of the largest time there")
        adversary.add_argument(
            "--misaligned_pairs_D", action="store_true", help="pictures under others' captions count as fake, too"
        )

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        ConsistencyObjective.check_flags(parser, args)
        for name in ("scm_lambda", "adv_lambda"):
            if getattr(args, name) < 0:
                parser.error(f"--{name} is {getattr(args, name)}: it must not be negative")
        if args.discriminator_learning_rate is not None and not args.discriminator_learning_rate > 0:
            parser.error(f"--discriminator_learning_rate is {args.discriminator_learning_rate}: it has to be positive")
        if not args.logit_std_discriminator > 0:
            parser.error(f"--logit_std_discriminator is {args.logit_std_discriminator}: it has to be positive")
        if not 0 <= args.largest_timestep_prob <= 1:
            parser.error(f"--largest_timestep_prob is {args.largest_timestep_prob}: it has to lie in [0, 1]")
        if args.misaligned_pairs_D and args.train_batch_size < 2:
            parser.error("--misaligned_pairs_D swaps the captions of a batch: it needs --train_batch_size 2 or more")
        if args.compile:
            parser.error("--compile hides the teacher's blocks from the hooks that the discriminator reads them by")

    @staticmethod
    def check_run(args: argparse.Namespace, accelerator: Accelerator, teacher: SanaTransformer2DModel) -> None:
        if accelerator.is_fsdp2:
            raise ValueError("the discriminator is a second trained model, which is tested with one process and DDP")
        if accelerator.mixed_precision == "fp16":
            raise ValueError("--mixed_precision is fp16, whose loss scale two optimisers cannot share: use bf16 or no")
        try:
            head_blocks(teacher.config.num_layers, args.head_block_ids)
        except ValueError as error:
            raise ValueError(f"--head_block_ids: {error}") from error

    @staticmethod
    def describe(args: argparse.Namespace) -> dict[str, object]:
        return ConsistencyObjective.describe(args) | {
            "loss": f"{args.scm_lambda:g} sCM + {args.adv_lambda:g} adversarial",
            "judged at": f"logit-normal times, mean {args.logit_mean_discriminator},"
            f" standard deviation {args.logit_std_discriminator}",
        }

    def __call__(self, rows: TrainingRows, step: int, draw: int) -> tuple[torch.Tensor, Measures]:
        args = self.args
        # A row's noise and time for the discriminator depend on its number in the run only.
        generators = [draw_generator(draw * args.train_batch_size + i, args.seed, stream=2) for i in range(len(rows))]
        loss, measures, trig_output = self.consistency(rows, step)
        if args.train_largest_timestep:
            prediction = self.predict_elsewhere(rows, generators)
        else:
            prediction = consistency_output(rows.latents, trig_output, rows.timesteps, self.sigma_data)
        timesteps = sample_diffusion_timesteps(
            len(rows),
            logit_mean=args.logit_mean_discriminator,
            logit_std=args.logit_std_discriminator,
            sigma_data=self.sigma_data,
            generator=generators,
        )
        timesteps = to_device(timesteps, rows.latents.device)
        noise = self.noise(rows, generators)

        # The student's side: the heads do not move.
        fake_features = self.features(rows, prediction, noise, timesteps)
        verdicts = frozen_verdicts(self.accelerator.unwrap_model(self.heads), fake_features)
        adversarial_loss = hinge_generator_loss(verdicts)

        # The heads' side: the student does not move.
        fakes = [{block: hidden_states.detach() for block, hidden_states in fake_features.items()}]
        with torch.no_grad():
            real_features = self.features(rows, rows.pred_original_sample, noise, timesteps)
            if args.misaligned_pairs_D:
                fakes.append(self.features(rows, rows.pred_original_sample, noise, timesteps, shift=1))
        real, *fake = self.heads(real_features, *fakes)
        discriminator_loss = hinge_discriminator_loss(real, torch.cat(fake))
        self.accelerator.backward(discriminator_loss)

        measures |= {
            "adversarial_loss": adversarial_loss.detach(),
            "discriminator_loss": discriminator_loss.detach(),
        }
        return args.scm_lambda * loss + args.adv_lambda * adversarial_loss, measures

    def noise(self, rows: TrainingRows, generators: list[torch.Generator]) -> torch.Tensor:
        noise = [torch.randn(rows.latents.shape[1:], generator=generator) for generator in generators]
        return to_device(torch.stack(noise), rows.latents.device)

    def predict_elsewhere(self, rows: TrainingRows, generators: list[torch.Generator]) -> torch.Tensor:
        """The student's predictions of the same pictures from other noise, often from nothing but noise."""
        timesteps = sample_diffusion_timesteps(
            len(rows),
            logit_mean=self.args.logit_mean,
            logit_std=self.args.logit_std,
            sigma_data=self.sigma_data,
            largest_probability=self.args.largest_timestep_prob,
            generator=generators,
        )
        timesteps = to_device(timesteps, rows.latents.device)
        latents = diffuse(rows.pred_original_sample, self.noise(rows, generators), timesteps, self.sigma_data)
        trig_output, _ = self.model(
            latents / self.sigma_data,
            timesteps,
            rows.prompt_embeds,
            rows.prompt_attention_mask,
            rows.guidance_scale,
        )
        return consistency_output(latents, trig_output, timesteps, self.sigma_data)

    def features(
        self,
        rows: TrainingRows,
        original_sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        shift: int = 0,
    ) -> dict[int, torch.Tensor]:
        """What the teacher sees in clean latents, real or predicted, noised; `shift` gives them others' prompts."""
        return block_features(
            self.teacher,
            self.accelerator.unwrap_model(self.heads).blocks,
            diffuse(original_sample, noise, timesteps, self.sigma_data),
            timesteps,
            rows.prompt_embeds.roll(shift, 0),
            rows.guidance_scale,
            prompt_attention_mask=rows.prompt_attention_mask.roll(shift, 0),
            sigma_data=self.sigma_data,
        )
