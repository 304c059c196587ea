"""Trajectories of the embedded teacher: generated, noised and decoded, each computed once and kept in a folder."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diffusers_tbcm import diffusion as diffusion_rows
from diffusers_tbcm.data.embeddings import UNCONDITIONAL, PromptEncoder
from diffusers_tbcm.draws import draw_generator
from diffusers_tbcm.files import written_beside
from diffusers_tbcm.guidance import guided_output
from diffusers_tbcm.trajectory import record_trajectory, reference_route, sample_timesteps
from diffusers_tbcm.trigflow import SIGMA_DATA, TrigFlowTransformer, consistency_output
from examples.tbcm.mini_teacher.emoji_metrics import MAX_SEQUENCE_LENGTH, SEED, TEACHER_DIR


BATCH_SIZE = 50  # prompts computed together, and the most that an interruption costs
ROUTE_STREAM, NOISE_STREAM = 1, 2  # of a prompt's random numbers; stream 0 is its initial noise, that of `draw`
CELL_SIZE = 96  # pixels of a picture in a grid
EULER = "euler"  # the reference route itself, without a draw in every partition


@dataclass
class Generation:
    """What a teacher passed through on its way from noise to x_0, the start at pi/2 left out.

    Args:
        noise: x at pi/2, of standard deviation `SIGMA_DATA`, (prompts, channels, height, width).
        timesteps: t in radians, (prompts, N - 1), descending.
        latents: x_t, (prompts, N - 1, channels, height, width).
        predictions: f(x_t, t), the shape of `latents`.
        original: the generated x_0, the shape of `noise`.
    """

    noise: torch.Tensor
    timesteps: torch.Tensor
    latents: torch.Tensor
    predictions: torch.Tensor
    original: torch.Tensor


class Teacher:
    """The embedded teacher as a TrigFlow network, its prompts, and a folder for what was computed with it.

    Args:
        prompts: what to draw; a prompt's place decides its random numbers.
        work_dir: computed batches are kept here, and found again by their settings.
    """

    def __init__(self, prompts: list[str], work_dir: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline = SanaPipeline.from_pretrained(TEACHER_DIR).to(self.device)
        self.network = TrigFlowTransformer(self.pipeline.transformer)
        self.encoder = PromptEncoder(self.pipeline, max_sequence_length=MAX_SEQUENCE_LENGTH)
        self.prompts = prompts
        self.work_dir = work_dir
        weights = TEACHER_DIR / "transformer" / "diffusion_pytorch_model.safetensors"
        self.digest = blake2b(weights.read_bytes(), digest_size=8).hexdigest()

    def generate(self, scheme: str, num_steps: int, guidance_scale: float) -> Generation:
        """Generate every prompt's picture from its own noise.

        Args:
            scheme: of `trajectory.SAMPLING_SCHEMES`, or `EULER`.
            num_steps: N, of which N - 1 are recorded.
            guidance_scale: classifier-free guidance weight.

        Returns:
            The trajectories, on the CPU.
        """
        settings: dict[str, str | float] = {"scheme": scheme, "num_steps": num_steps, "guidance_scale": guidance_scale}

        def compute(indices: range) -> dict[str, torch.Tensor]:
            return vars(self._generate(indices, scheme, num_steps, guidance_scale))

        return Generation(**self._in_batches("generation", settings, compute))

    def diffuse(self, scheme: str, num_steps: int, guidance_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise every generated x_0 to all angles of its trajectory with one fresh noise, and predict it from there.

        Args:
            scheme: of `generate`.
            num_steps: of `generate`.
            guidance_scale: of `generate`, and of the prediction.

        Returns:
            The fresh noise (prompts, channels, height, width), of standard deviation `SIGMA_DATA`, and f(x_t, t) of
            the noised x_t, (prompts, N - 1, channels, height, width); on the CPU.
        """
        generation = self.generate(scheme, num_steps, guidance_scale)

        @torch.no_grad()
        def compute(indices: range) -> dict[str, torch.Tensor]:
            rows = slice(indices.start, indices.stop)
            original, timesteps = generation.original[rows].to(self.device), generation.timesteps[rows].to(self.device)
            noise = self._noise(indices, NOISE_STREAM)
            text = self.encoder([UNCONDITIONAL] * len(indices) + [self.prompts[index] for index in indices])
            scale = torch.full_like(timesteps[:, 0], guidance_scale)
            predictions = []
            for t in timesteps.unbind(1):
                sample = diffuse(original, noise, t)
                output = guided_output(self.network, sample / SIGMA_DATA, t, text, scale)
                predictions.append(consistency_output(sample, output, t, SIGMA_DATA))
            return {"noise": noise, "predictions": torch.stack(predictions, dim=1)}

        settings: dict[str, str | float] = {"scheme": scheme, "num_steps": num_steps, "guidance_scale": guidance_scale}
        tensors = self._in_batches("diffusion", settings, compute)
        return tensors["noise"], tensors["predictions"]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Decode latents of standard deviation `SIGMA_DATA`, (batch, channels, height, width), to pictures."""
        vae = self.pipeline.vae
        scale = SIGMA_DATA * vae.config["scaling_factor"]
        pixels = torch.cat([vae.decode(chunk.to(self.device) / scale).sample for chunk in latents.split(BATCH_SIZE)])
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")

    def _noise(self, indices: range, stream: int) -> torch.Tensor:
        config = self.network.transformer.config
        shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
        noise = [torch.randn(shape, generator=draw_generator(index, SEED, stream)) for index in indices]
        return SIGMA_DATA * torch.cat(noise).to(self.device)

    def _generate(self, indices: range, scheme: str, num_steps: int, guidance_scale: float) -> Generation:
        noise = self._noise(indices, stream=0)
        if scheme == EULER:
            timesteps = reference_route(num_steps).expand(len(indices), -1).to(self.device)
        else:
            generators = [draw_generator(index, SEED, ROUTE_STREAM) for index in indices]
            timesteps = sample_timesteps(scheme, len(indices), num_steps, generator=generators, device=self.device)
        text = self.encoder([self.prompts[index] for index in indices])
        negative = self.encoder([UNCONDITIONAL])
        trajectory = record_trajectory(
            self.network,
            noise / SIGMA_DATA,
            timesteps,
            text,
            negative,
            torch.full((len(indices),), guidance_scale, device=self.device),
            sigma_data=SIGMA_DATA,
        )
        latents, output, timesteps = trajectory.latents, trajectory.velocity / SIGMA_DATA, trajectory.timesteps
        predictions = consistency_output(latents, output, timesteps, SIGMA_DATA)
        return Generation(noise, timesteps, latents, predictions, trajectory.pred_original_sample)

    def _in_batches(
        self, kind: str, settings: dict[str, str | float], compute: Callable[[range], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        name = "-".join([kind, *map(str, settings.values())])
        batches = []
        for start in tqdm(range(0, len(self.prompts), BATCH_SIZE), desc=name):
            indices = range(start, min(start + BATCH_SIZE, len(self.prompts)))
            prompts = [self.prompts[index] for index in indices]
            described = {**settings, "start": start, "prompts": prompts, "seed": SEED, "teacher": self.digest}
            batches.append(kept(self.work_dir, name, described, functools.partial(compute, indices)))
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def diffuse(original: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Noise clean latents: cos(t) x_0 + sin(t) z.

    Args:
        original: x_0, (batch, channels, height, width).
        noise: z, of the standard deviation of x_0, the shape of `original`.
        timestep: t in radians, (batch,).

    Returns:
        x_t, the shape of `original`.
    """
    return diffusion_rows.diffuse(original, noise, timestep, sigma_data=1.0)


def kept(
    folder: Path, name: str, settings: dict[str, Any], compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Read tensors that were computed from these settings before, or compute and write them.

    Args:
        folder: where they are kept.
        name: the beginning of the file's name.
        settings: what the tensors depend on, JSON values: others have another file.
        compute: gives the tensors.

    Returns:
        The tensors, on the CPU.
    """
    digest = blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    path = folder / f"{name}-{digest}.safetensors"
    if path.exists():
        return load_file(path)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in compute().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        save_file(tensors, partial)
    return tensors
