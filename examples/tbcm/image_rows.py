"""Where the rows of sCM, Sana-Sprint and LCM come from: captioned pictures, noised, and the frozen teacher there."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderDC
from row_stream import Encoder, RowSource

from diffusers_tbcm.data.latents import LatentCache, latents_fingerprint, precompute_latents
from diffusers_tbcm.data.pictures import CaptionedImages
from diffusers_tbcm.data.prompts import draw_generator, prompt_at
from diffusers_tbcm.diffusion import diffusion_rows, sample_diffusion_timesteps
from diffusers_tbcm.discrete import neighbouring_timesteps
from diffusers_tbcm.pipeline_folder import vae_scale_factor
from diffusers_tbcm.training.replay import Recording
from diffusers_tbcm.trajectory import TrajectoryOutput, reference_route
from diffusers_tbcm.transfer import to_device
from diffusers_tbcm.trigflow import TrigFlowTransformer


class ImageRows(RowSource):
    """One row a picture; where it lies on the way to noise is a subclass's choice, `draw_timesteps`.

    The pictures are encoded once, before training, in float32.

    Args:
        args: the flags.
        accelerator: the run's.
        teacher: the frozen network F.
        teacher_folder: its pipeline's folder, for the autoencoder.
        encoder: embeds a list of prompts: (B, L, D) and their mask (B, L).
        data: what to draw from, from `load_data`.
        latent_shape: channels, height, width.
        sigma_data: standard deviation of the latents.
    """

    rows_per_prompt = 1
    filters = False

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        teacher: TrigFlowTransformer,
        teacher_folder: Path,
        encoder: Encoder,
        data: CaptionedImages,
        latent_shape: tuple[int, int, int],
        *,
        sigma_data: float,
    ) -> None:
        super().__init__(args, accelerator, teacher, encoder, len(data), latent_shape, sigma_data)
        self.images = data
        resolution = latent_shape[-1] * vae_scale_factor(teacher_folder)
        folder = Path(args.latents_cache or Path(args.output_dir) / "latents")
        fingerprint = latents_fingerprint(data, teacher_folder, resolution=resolution, dtype=torch.float32)
        precompute_latents(
            data,
            lambda: AutoencoderDC.from_pretrained(teacher_folder, subfolder="vae").to(self.device),
            folder,
            fingerprint,
            resolution=resolution,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        accelerator.wait_for_everyone()
        self.latents = LatentCache(folder, fingerprint)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        data = parser.add_argument_group("pictures")
        data.add_argument("--train_data_dir", help="folder of pictures with a metadata.jsonl of captions")
        data.add_argument("--dataset_name", help="instead of a folder: a `datasets` Hub id")
        data.add_argument("--image_column", default="image")
        data.add_argument("--max_train_samples", type=int, help="use no more pictures than this")
        data.add_argument(
            "--latents_cache",
            metavar="DIR",
            help="the pictures' latents, encoded once, or used from there; default: latents/ in --output_dir",
        )

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        if (args.train_data_dir is None) == (args.dataset_name is None):
            parser.error("give either --train_data_dir or --dataset_name")
        if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
            parser.error(f"--train_data_dir is {args.train_data_dir}: there is no such folder")
        if args.max_train_samples is not None and args.max_train_samples < 1:
            parser.error(f"--max_train_samples is {args.max_train_samples}: it has to be positive")

    @staticmethod
    def load_data(args: argparse.Namespace) -> CaptionedImages:
        return CaptionedImages(
            args.train_data_dir or args.dataset_name,
            config=args.dataset_config_name,
            split=args.dataset_split,
            image_column=args.image_column,
            caption_column=args.caption_column,
            max_images=args.max_train_samples,
        )

    def draw_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        raise NotImplementedError

    def record(self, draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Noise the pictures of some draws; a recording has one place for each, and all are kept."""
        # Everything random of a draw: its caption, guidance scale, noise and time.
        generators = [draw_generator(draw, self.args.seed) for draw in draws]
        pictures = [prompt_at(draw, self.num_prompts, self.args.seed) for draw in draws]
        captions = [
            self.images.pick_caption(picture, generator)
            for picture, generator in zip(pictures, generators, strict=True)
        ]
        text = self.encoder(captions)
        guidance_scale, noise = self.draw_guidance_and_noise(generators)

        rows = diffusion_rows(
            self.teacher,
            to_device(self.latents(pictures), self.device),
            noise,
            to_device(self.draw_timesteps(generators), self.device),
            text.embeds,
            self.negative_embeds,
            guidance_scale,
            prompt_attention_mask=text.mask,
            negative_prompt_attention_mask=self.negative_mask,
            sigma_data=self.sigma_data,
        )
        trajectory = TrajectoryOutput(
            latents=rows.latents.unsqueeze(1),
            velocity=rows.velocity.unsqueeze(1),
            timesteps=rows.timesteps.unsqueeze(1),
            pred_original_sample=rows.pred_original_sample,
        )
        keep = torch.ones(len(draws), dtype=torch.bool)
        return Recording(trajectory, text.embeds, text.mask, guidance_scale), keep


class LogitNormalRows(ImageRows):
    """Rows at logit-normal times, sCM's and Sana-Sprint's."""

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        ImageRows.add_flags(parser)
        times = parser.add_argument_group("times")
        times.add_argument("--logit_mean", type=float, default=0.2, help="of the rows' logit-normal times")
        times.add_argument("--logit_std", type=float, default=1.6, help="of the rows' logit-normal times")

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        ImageRows.check_flags(parser, args)
        if not args.logit_std > 0:
            parser.error(f"--logit_std is {args.logit_std}: it has to be positive")

    @staticmethod
    def describe(args: argparse.Namespace) -> dict[str, object]:
        """What the model card says of the rows."""
        return {"times": f"logit-normal, mean {args.logit_mean}, standard deviation {args.logit_std}"}

    def draw_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        return sample_diffusion_timesteps(
            len(generators),
            logit_mean=self.args.logit_mean,
            logit_std=self.args.logit_std,
            sigma_data=self.sigma_data,
            generator=generators,
        )


class GridRows(ImageRows):
    """Rows at the times of a grid, LCM's."""

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        ImageRows.add_flags(parser)
        grid = parser.add_argument_group("grid")
        grid.add_argument("--num_ddim_timesteps", type=int, default=50, help="steps of the teacher's ODE solver")
        grid.add_argument("--flow_shift", type=float, default=2.5, help="of the grid")

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        ImageRows.check_flags(parser, args)
        for name in ("num_ddim_timesteps", "flow_shift"):
            if not getattr(args, name) > 0:
                parser.error(f"--{name} is {getattr(args, name)}: it has to be positive")

    @staticmethod
    def describe(args: argparse.Namespace) -> dict[str, object]:
        """What the model card says of the rows."""
        return {"grid": f"{args.num_ddim_timesteps} steps, shift {args.flow_shift}"}

    def draw_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        route = reference_route(self.args.num_ddim_timesteps, self.args.flow_shift)
        return neighbouring_timesteps(route, len(generators), generator=generators)[0]
