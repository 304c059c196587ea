"""Train the embedded teacher: a small Sana text-to-image pipeline on captioned emoji, from nothing.

The folder it writes is an ordinary `SanaPipeline` of the real classes (AutoencoderDC, GemmaTokenizer, Gemma2Model,
SanaTransformer2DModel), so everything that works on it works on the 0.6B model. Steps:

    1. images and captions from two npm packages (Noto and Fluent 3D emoji), on white, at 64 px
    2. the deep-compression autoencoder, 64 px -> 8 x 8 latents of unit variance
    3. the tokenizer (BPE on the captions)
    4. text encoder and transformer together, by flow matching: first which picture a caption means, then with its
       mirror image and more captions without a style, so that a caption leaves something for the noise to decide
    5. the pipeline folder, its prompts and its measurements

    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0    # then unpack both
    python -m examples.tbcm.mini_teacher.make_mini_teacher --noto_dir ... --fluent_dir ... \\
        --output_dir ... --work_dir ...

Run it from the checkout; the same command again resumes. A GPU is used where there is one.
"""

import argparse
import inspect
import json
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

from diffusers_tbcm.evaluation.evaluator import FeatureReference, MobileNetFeatures

from .emoji_data import (
    CAPTIONS,
    RESOLUTION,
    STYLELESS_CAPTIONS,
    Emoji,
    all_captions,
    caption,
    list_emoji,
    load_images,
    random_caption,
    to_model_range,
)
from .emoji_metrics import (
    DISTILLATION_PROMPTS_FILE,
    GUIDANCE_SCALE,
    REFERENCE_FILE,
    EvaluationPrompt,
    Meter,
    draw,
    load_evaluation,
    save_evaluation,
)


LATENT_CHANNELS = 16
TEXT_WIDTH = 128
VOCAB_SIZE = 1024
# Every token sees this many tokens (itself included) in each of two layers, so a token's embedding depends on the
# 2 * (TEXT_WINDOW - 1) tokens before it and on nothing further back in Sana's complex human instruction.
TEXT_WINDOW = 6
INSTRUCTION_TAIL_TOKENS = 12
DIFFUSERS_TRAIN_TIMESTEPS = 1000

CAPTION_DROPOUT = 0.1
STYLELESS_PROBABILITY = {"teacher": 0.1, "mirrored_teacher": 0.4}
EVALUATION_PROMPTS = 500

NOTICE = """\
The weights in this folder were trained on pictures from these works:

Noto Emoji, Copyright Google LLC, Apache License 2.0
    npm package emoji-datasource-google 16.0.0, https://github.com/googlefonts/noto-emoji
Fluent Emoji (3D), Copyright Microsoft Corporation, MIT License
    npm package @lobehub/fluent-emoji-3d 1.1.0, https://github.com/microsoft/fluentui-emoji
Names and categories: emoji-datasource, MIT License, https://github.com/iamcal/emoji-data

The pictures themselves are not part of this folder.
"""

CARD_TEMPLATE = Path(__file__).with_name("mini_teacher_card.md")


# 2. Autoencoder ------------------------------------------------------------------------------------------------------


def build_autoencoder() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 48, 96, 192),
        decoder_block_out_channels=(32, 48, 96, 192),
        encoder_layers_per_block=(0, 1, 2, 2),
        decoder_layers_per_block=(0, 2, 2, 2),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        scaling_factor=1.0,
    )


def train_autoencoder(images: torch.Tensor, args: argparse.Namespace, device: torch.device) -> AutoencoderDC:
    """L1 + MSE on flipped and shifted pictures; latents are pushed to zero mean and unit variance, with some noise."""
    vae = build_autoencoder().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.autoencoder_learning_rate, betas=(0.9, 0.99))
    run = Run(args.work_dir / "autoencoder.pt", vae=vae, optimizer=optimizer)
    for step in run.steps(args.autoencoder_steps, "Autoencoder", args.checkpointing_steps):
        set_learning_rate(optimizer, args.autoencoder_learning_rate, step, args.autoencoder_steps)
        generator = torch.Generator().manual_seed(args.seed + step)
        index = torch.randint(len(images), (args.autoencoder_batch_size,), generator=generator)
        batch = to_model_range(images[index]).to(device)
        flip = torch.rand(len(batch), 1, 1, 1, generator=generator).to(device) < 0.5
        batch = torch.where(flip, batch.flip(3), batch)
        dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
        batch = F.pad(batch, (4, 4, 4, 4), value=1.0)[..., 4 + dy : 68 + dy, 4 + dx : 68 + dx]

        with torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode(batch).latent.float()
            noisy = latents + args.autoencoder_noise * torch.randn(latents.shape, generator=generator).to(device)
            error = vae.decode(noisy).sample.float() - batch
        mean, var = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        moments = mean.square().mean() + (var - 1).square().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.01 * moments
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        psnr = -10 * math.log10(error.detach().square().mean().item() / 4)
        run.report(loss=loss.item(), psnr=psnr, latent_std=latents.std().item())
    vae.eval().requires_grad_(False)
    latents = encode_images(vae, images[:: max(1, len(images) // 512)], device)
    vae.register_to_config(scaling_factor=1.0 / latents.std().item())
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderDC, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    chunks = [vae.encode(to_model_range(chunk).to(device)).latent for chunk in images.split(64)]
    return torch.cat(chunks) * vae.config.scaling_factor


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderDC, images: torch.Tensor, device: torch.device) -> float:
    """Mean PSNR in dB over pictures."""
    target = to_model_range(images).to(device)
    mse = (vae.decode(vae.encode(target).latent).sample.clamp(-1, 1) - target).square().mean((1, 2, 3))
    return (-10 * (mse / 4).log10()).mean().item()


# 3. Tokenizer and text encoder ---------------------------------------------------------------------------------------


def complex_human_instruction() -> str:
    """The text that the Sana pipelines put before a prompt by default."""
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(default)


def train_tokenizer(captions: list[str]) -> GemmaTokenizerFast:
    """Byte-fallback BPE, learnt on the captions and on the instruction so that neither falls apart into bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    # The space is a token of its own, so that a word is the same tokens wherever it stands.
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "isolated")
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([*captions, complex_human_instruction()], trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    gemma = Tokenizer(models.BPE(state["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    gemma.normalizer = bpe.normalizer
    return GemmaTokenizerFast(tokenizer_object=gemma, add_bos_token=True)


def build_text_encoder(vocab_size: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=TEXT_WIDTH // 4,
            query_pre_attn_scalar=TEXT_WIDTH // 4,
            sliding_window=TEXT_WINDOW,
            layer_types=["sliding_attention", "sliding_attention"],
            max_position_embeddings=8192,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def encode_captions(
    captions: list[str], tokenizer: GemmaTokenizerFast, text_encoder: Gemma2Model, with_instruction: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L, D) embeddings and (B, L) mask as `SanaPipeline.encode_prompt` selects them, without its padding.

    With the instruction the pipeline keeps <bos>, the instruction's last token and the prompt. Only the instruction's
    tail is run here, since the attention window reaches no further.
    """
    tail: list[int] = []
    if with_instruction:
        tail = tokenizer(complex_human_instruction(), add_special_tokens=False).input_ids[-INSTRUCTION_TAIL_TOKENS:]
    rows = [[tokenizer.bos_token_id, *tail, *tokenizer(c, add_special_tokens=False).input_ids] for c in captions]
    length = max(map(len, rows))
    device = text_encoder.device
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    embeds = text_encoder(ids, attention_mask=mask)[0]
    if with_instruction:
        keep = [0, *range(INSTRUCTION_TAIL_TOKENS, length)]
        embeds, mask = embeds[:, keep], mask[:, keep]
    return embeds, mask


# 4. Flow matching ----------------------------------------------------------------------------------------------------


def build_transformer() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=8,
        attention_head_dim=32,
        num_layers=6,
        num_cross_attention_heads=4,
        cross_attention_head_dim=64,
        cross_attention_dim=256,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.5,
        sample_size=RESOLUTION // 8,
        patch_size=2,
        interpolation_scale=1,
        qk_norm="rms_norm_across_heads",
        # Dense time: SanaPipeline feeds 0..1000 times this, so that the network sees s in [0, 1], as Sana-Sprint's do.
        timestep_scale=1 / DIFFUSERS_TRAIN_TIMESTEPS,
    )


class TextToLatent(torch.nn.Module):
    """Text encoder and transformer as one module: they share an optimiser and an EMA."""

    def __init__(self, text_encoder: Gemma2Model, transformer: SanaTransformer2DModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer


def draw_lesson(lessons: list[Emoji], styleless_probability: float, index: int, rng: random.Random) -> str:
    return random_caption(lessons[index], rng, styleless_probability)


def train_teacher(
    stage: str,
    model: TextToLatent,
    latents: torch.Tensor,
    draw_caption: Callable[[int, random.Random], str],
    tokenizer: GemmaTokenizerFast,
    steps: int,
    args: argparse.Namespace,
    device: torch.device,
) -> TextToLatent:
    """Flow matching, v = e - x_0 at x_s = (1 - s) x_0 + s e, with logit-normal s; gives the averaged weights.

    `latents` holds the versions of every picture that its captions do not tell apart, (pictures, versions, C, H, W);
    `draw_caption` gives one of the captions of a picture, by its number.
    """
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(model.parameters(), decay=args.ema_decay)
    ema.to(device)
    run = Run(args.work_dir / f"{stage}.pt", model=model, optimizer=optimizer, ema=ema)
    for step in run.steps(steps, stage, args.checkpointing_steps):
        set_learning_rate(optimizer, args.learning_rate, step, steps)
        generator = torch.Generator().manual_seed(args.seed + step)
        rng = random.Random(args.seed + step)
        index = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        version = torch.randint(latents.shape[1], (args.train_batch_size,), generator=generator)
        captions = ["" if rng.random() < CAPTION_DROPOUT else draw_caption(i, rng) for i in index.tolist()]
        x0 = latents[index, version].to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        normal = torch.randn(len(x0), generator=generator).to(device)
        s = torch.sigmoid(args.logit_mean + args.logit_std * normal)
        expanded = s.view(-1, 1, 1, 1)

        with torch.autocast(device.type, torch.bfloat16):
            embeds, mask = encode_captions(captions, tokenizer, model.text_encoder, with_instruction=step % 3 == 0)
            velocity = model.transformer(
                (1 - expanded) * x0 + expanded * noise,
                encoder_hidden_states=embeds,
                timestep=s,
                encoder_attention_mask=mask,
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        run.report(loss=loss.item())
    ema.copy_to(model.parameters())
    return model


# Shared by all stages ------------------------------------------------------------------------------------------------


class Run:
    """A resumable loop: restores its parts from `path`, saves them atomically, shows a smoothed progress bar."""

    def __init__(self, path: Path, **parts: Any) -> None:
        self.path, self.parts, self.step = path, parts, 0
        self.smooth: dict[str, float] = {}
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.step = state.pop("step")
            for name, part in parts.items():
                part.load_state_dict(state[name])

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        part_file = self.path.with_suffix(".part")
        torch.save({"step": self.step, **state}, part_file)
        part_file.replace(self.path)

    def steps(self, total: int, description: str, save_every: int) -> Iterator[int]:
        self.bar = tqdm(total=total, initial=self.step, desc=description, mininterval=5)
        while self.step < total:
            yield self.step
            self.step += 1
            self.bar.update()
            if self.step % save_every == 0 or self.step == total:
                self.save()
        self.bar.close()

    def report(self, **values: float) -> None:
        for name, value in values.items():
            self.smooth[name] = 0.99 * self.smooth.get(name, value) + 0.01 * value
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in self.smooth.items()}, refresh=False)


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, total: int) -> None:
    """200 warm-up steps, constant, then a linear fall to zero over the last third."""
    factor = min(1.0, (step + 1) / 200, 3 * (total - step) / total)
    for group in optimizer.param_groups:
        group["lr"] = peak * factor


# 5. The pipeline folder ----------------------------------------------------------------------------------------------


def save_pipeline(model: TextToLatent, vae: AutoencoderDC, tokenizer: GemmaTokenizerFast, output_dir: Path) -> None:
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder.float().cpu().eval(),
        # Half the bytes; diffusers loads them as float32 all the same, transformers would keep float16.
        vae=vae.half().cpu().eval(),
        transformer=model.transformer.half().cpu().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=DIFFUSERS_TRAIN_TIMESTEPS, shift=2.5),
    )
    # As transformers 4 calls it; transformers 5, which would write "GemmaTokenizer", understands it too.
    pipeline.register_to_config(tokenizer=("transformers", "GemmaTokenizerFast"))
    pipeline.save_pretrained(output_dir, safe_serialization=True)


def write_prompts(pictures: list[Emoji], output_dir: Path, seed: int) -> None:
    """Distillation and evaluation prompts, half of the latter without a style; those of held-out pairs come last."""
    lessons = [p for p in pictures if p.taught]
    prompts = sorted({text for p in lessons for text in all_captions(p)})
    (output_dir / DISTILLATION_PROMPTS_FILE).write_text("\n".join(prompts) + "\n", encoding="utf-8")

    rng = random.Random(seed)
    evaluation = []
    for picture in rng.sample(lessons, EVALUATION_PROMPTS):
        templates = rng.choice((CAPTIONS[picture.style], STYLELESS_CAPTIONS))
        evaluation.append(EvaluationPrompt(caption(rng.choice(templates), picture.concept), picture.concept, False))
    for picture in pictures:
        if picture.held_out:
            prompt = caption(rng.choice(CAPTIONS[picture.style]), picture.concept)
            evaluation.append(EvaluationPrompt(prompt, picture.concept, True))
    save_evaluation(evaluation, output_dir)


def measure(output_dir: Path, images: torch.Tensor, pictures: list[Emoji]) -> dict[str, dict[str, float]]:
    """MobileNet-FD and top-5 retrieval of the saved pipeline; retrieval alone on the held-out pairs.

    The reference is every picture that the transformer learnt, and its mirror image.
    """
    taught = torch.tensor([p.taught for p in pictures])
    concepts = [p.concept for p in pictures if p.taught]
    real = torch.cat([images[taught], images[taught].flip(3)])
    features = MobileNetFeatures().extract([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in real])
    FeatureReference.fit(features, concepts * 2).save(output_dir / REFERENCE_FILE)

    meter = Meter(output_dir)
    pipeline = SanaPipeline.from_pretrained(output_dir)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = load_evaluation(output_dir)
    prompted = [item.concept for item in evaluation]
    results = {}
    for steps in (4, 20):
        drawn = draw(pipeline, [item.prompt for item in evaluation], steps)
        held_out = meter(drawn[EVALUATION_PROMPTS:], prompted[EVALUATION_PROMPTS:])
        results[f"{steps} steps"] = {
            **meter(drawn[:EVALUATION_PROMPTS], prompted[:EVALUATION_PROMPTS]),
            "top-5 retrieval, held-out pairs": held_out["top-5 retrieval"],
        }
    return results


def write_card(
    args: argparse.Namespace, record: dict[str, Any], pipeline: SanaPipeline, pictures: list[Emoji]
) -> None:
    def millions(module: torch.nn.Module) -> float:
        return sum(parameter.numel() for parameter in module.parameters()) / 1e6

    rows = [[steps.split()[0], *row.values()] for steps, row in record["results"].items()]
    card = CARD_TEMPLATE.read_text(encoding="utf-8").format(
        resolution=RESOLUTION,
        concepts=len({p.concept for p in pictures if p.in_teacher}),
        seed=record["seed"],
        device=record["device"],
        latent_channels=LATENT_CHANNELS,
        window=TEXT_WINDOW,
        vae_parameters=millions(pipeline.vae),
        text_parameters=millions(pipeline.text_encoder),
        transformer_parameters=millions(pipeline.transformer),
        autoencoder_steps=args.autoencoder_steps,
        autoencoder_batch=args.autoencoder_batch_size,
        steps=args.max_train_steps,
        mirrored_steps=args.mirrored_train_steps,
        batch=args.train_batch_size,
        pictures=record["teacher"]["pictures"],
        held_out=sum(p.held_out for p in pictures),
        psnr=record["autoencoder"]["held-out PSNR (dB)"],
        guidance=GUIDANCE_SCALE,
        rows="\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows),
        prompts=EVALUATION_PROMPTS,
    )
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")
    (args.output_dir / "NOTICE").write_text(NOTICE, encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto_dir", type=Path, required=True, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("--fluent_dir", type=Path, required=True, help="unpacked npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--work_dir", type=Path, required=True, help="checkpoints of the two trainings")
    parser.add_argument("--output_dir", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--autoencoder_steps", type=int, default=2000)
    parser.add_argument("--autoencoder_batch_size", type=int, default=16)
    parser.add_argument("--autoencoder_learning_rate", type=float, default=1e-3)
    parser.add_argument("--autoencoder_noise", type=float, default=0.1, help="added to unit-variance latents")
    parser.add_argument("--max_train_steps", type=int, default=7000, help="flow matching, first stage")
    parser.add_argument("--mirrored_train_steps", type=int, default=7000, help="with mirror images, second stage")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--logit_mean", type=float, default=0.4, help="of the logit-normal flow time, 1 = noise")
    parser.add_argument("--logit_std", type=float, default=1.4)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # 1. Images and captions
    pictures = list_emoji(args.noto_dir, args.fluent_dir, args.seed)
    images = load_images(pictures)
    seen = torch.tensor([not p.held_out for p in pictures])
    taught = torch.tensor([p.taught for p in pictures])
    print(f"{len(pictures)} pictures, {int(taught.sum())} teach the transformer, {int((~seen).sum())} are held out")

    # 2. Autoencoder
    vae = train_autoencoder(images[seen], args, device)
    psnr = reconstruction_psnr(vae, images[~seen], device)
    print(f"Autoencoder: PSNR {psnr:.2f} dB on held-out pictures, scaling_factor {vae.config.scaling_factor:.4f}")

    # 3. Tokenizer
    lessons = [p for p, t in zip(pictures, taught.tolist(), strict=True) if t]
    tokenizer = train_tokenizer([text for p in lessons for text in all_captions(p)])

    # 4. Text encoder and transformer
    model = TextToLatent(build_text_encoder(len(tokenizer)), build_transformer())
    versions = [encode_images(vae, images[taught], device), encode_images(vae, images[taught].flip(3), device)]
    for stage, steps, latents in (
        ("teacher", args.max_train_steps, versions[:1]),
        ("mirrored_teacher", args.mirrored_train_steps, versions),
    ):
        stacked = torch.stack(latents, dim=1)
        draw_caption = partial(draw_lesson, lessons, STYLELESS_PROBABILITY[stage])
        model = train_teacher(stage, model, stacked, draw_caption, tokenizer, steps, args, device)

    # 5. The pipeline folder
    save_pipeline(model, vae, tokenizer, args.output_dir)
    write_prompts(pictures, args.output_dir, args.seed)
    results = measure(args.output_dir, images, pictures)
    record = {
        "autoencoder": {"held-out PSNR (dB)": round(psnr, 2), "steps": args.autoencoder_steps},
        "teacher": {
            "steps": args.max_train_steps,
            "steps, mirrored": args.mirrored_train_steps,
            "batch size": args.train_batch_size,
            "pictures": len(lessons),
        },
        "results": results,
        "seed": args.seed,
        "device": device.type,
    }
    (args.output_dir / "measurements.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_card(args, record, SanaPipeline.from_pretrained(args.output_dir), pictures)
    print(f"Saved {args.output_dir}\n{json.dumps(record, indent=2)}")


if __name__ == "__main__":
    main()
