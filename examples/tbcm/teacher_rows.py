"""Where TBCM's rows come from, steps 1 to 4 of Algorithm 1: a frozen teacher along its own denoising trajectories."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from row_stream import Encoder, RowSource

from diffusers_tbcm.brightness import cached_black_latent, keep_mask
from diffusers_tbcm.data.prompts import PromptList, draw_generator, load_prompts, prompt_at
from diffusers_tbcm.pipeline_folder import vae_scale_factor
from diffusers_tbcm.training.replay import Recording
from diffusers_tbcm.trajectory import SAMPLING_SCHEMES, record_trajectory, sample_timesteps
from diffusers_tbcm.trigflow import TrigFlowTransformer


class TeacherRows(RowSource):
    """Rows on the teacher's trajectories, --route_steps - 1 a prompt.

    Args:
        args: the flags.
        accelerator: the run's.
        teacher: the frozen network F.
        teacher_folder: its pipeline's folder, for the brightness filter.
        encoder: embeds a list of prompts: (B, L, D) and their mask (B, L).
        data: what to draw from, from `load_data`.
        latent_shape: channels, height, width.
        sigma_data: standard deviation of the latents.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        teacher: TrigFlowTransformer,
        teacher_folder: Path,
        encoder: Encoder,
        data: PromptList,
        latent_shape: tuple[int, int, int],
        *,
        sigma_data: float,
    ) -> None:
        super().__init__(args, accelerator, teacher, encoder, len(data.prompts), latent_shape, sigma_data)
        self.prompts = data.prompts
        self.rows_per_prompt = args.route_steps - 1
        self.filters = args.brightness_threshold > 0
        if self.filters:
            pixels = latent_shape[-1] * vae_scale_factor(teacher_folder)
            with accelerator.main_process_first():
                cache = Path(args.output_dir) / f"black_latent_{pixels}.safetensors"
                self.black = cached_black_latent(teacher_folder, pixels, cache).to(self.device)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        data = parser.add_argument_group("prompts")
        data.add_argument("--prompts_file", help="UTF-8 text, one prompt a line, or jsonl, csv, parquet")
        data.add_argument("--dataset_name", help="instead of a file: a `datasets` Hub id or folder")
        data.add_argument("--streaming", action="store_true", help="read the data set as it comes, to --max_prompts")
        data.add_argument("--max_prompts", type=int, help="read no more prompts than this")
        route = parser.add_argument_group("trajectories")
        route.add_argument("--route_steps", type=int, default=16, help="teacher steps N of a trajectory")
        route.add_argument("--sampling_scheme", choices=SAMPLING_SCHEMES, default="reference")
        route.add_argument("--flow_shift", type=float, default=2.5, help="of the reference route")
        route.add_argument("--logit_mean", type=float, default=0.2, help="of the logit_normal scheme")
        route.add_argument("--logit_std", type=float, default=1.6, help="of the logit_normal scheme")
        route.add_argument("--brightness_threshold", type=float, default=1.0, help="0: no filter, the VAE never loads")
        route.add_argument("--brightness_hard", action="store_true", help="drop all below the threshold (the paper)")

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        if (args.prompts_file is None) == (args.dataset_name is None):
            parser.error("give either --prompts_file or --dataset_name")
        if args.route_steps < 2:
            parser.error(f"--route_steps is {args.route_steps}: it takes 2, as the step at pi/2 gives no training row")
        for name in ("flow_shift", "logit_std"):
            if not getattr(args, name) > 0:
                parser.error(f"--{name} is {getattr(args, name)}: it has to be positive")
        if args.brightness_threshold < 0:
            parser.error(f"--brightness_threshold is {args.brightness_threshold}: it must not be negative")
        if args.streaming and args.dataset_name is None:
            parser.error("--streaming is for --dataset_name")
        if args.max_prompts is not None and args.max_prompts < 1:
            parser.error(f"--max_prompts is {args.max_prompts}: it has to be positive")

    @staticmethod
    def describe(args: argparse.Namespace) -> dict[str, object]:
        """What the model card says of the rows."""
        return {"route": f"{args.sampling_scheme}, {args.route_steps} steps, shift {args.flow_shift}"}

    @staticmethod
    def load_data(args: argparse.Namespace) -> PromptList:
        return load_prompts(
            args.prompts_file or args.dataset_name,
            config=args.dataset_config_name,
            split=args.dataset_split,
            column=args.caption_column,
            streaming=args.streaming,
            max_prompts=args.max_prompts,
        )

    def draw_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        """Give every draw a route of its own, (draws, route_steps)."""
        args = self.args
        return sample_timesteps(
            args.sampling_scheme,
            len(generators),
            args.route_steps,
            shift=args.flow_shift,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            sigma_data=self.sigma_data,
            generator=generators,
            device=self.device,
        )

    def negative_prompt(self, prompt_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the unconditional branch reads, and its mask, beside prompts of mask (draws, L): the empty prompt."""
        return self.negative_embeds, self.negative_mask

    def record(self, draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Record the trajectories of some draws; which of them the brightness filter keeps comes with them."""
        args = self.args

        # 1. Prompts
        generators = [draw_generator(draw, args.seed) for draw in draws]
        prompts = [self.prompts[prompt_at(draw, self.num_prompts, args.seed)] for draw in draws]
        text = self.encoder(prompts)
        guidance_scale, noise = self.draw_guidance_and_noise(generators)

        # 2. Timesteps
        timesteps = self.draw_timesteps(generators)

        # 3. The teacher's trajectory
        negative_embeds, negative_mask = self.negative_prompt(text.mask)
        trajectory = record_trajectory(
            self.teacher,
            noise,
            timesteps,
            text.embeds,
            negative_embeds,
            guidance_scale,
            prompt_attention_mask=text.mask,
            negative_prompt_attention_mask=negative_mask,
            sigma_data=self.sigma_data,
        )

        # 4. Brightness filter
        keep = torch.ones(len(draws), dtype=torch.bool)
        if self.filters:
            keep = keep_mask(
                trajectory.pred_original_sample,
                self.black,
                args.brightness_threshold,
                sigma_data=self.sigma_data,
                hard=args.brightness_hard,
                generator=generators,
            )
        return Recording(trajectory, text.embeds, text.mask, guidance_scale), keep
