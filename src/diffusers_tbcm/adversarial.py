"""Latent adversarial distillation, Sana-Sprint's second loss (LADD, arXiv 2403.12015; arXiv 2503.09641, Sec. 3.3).

The discriminator is the frozen teacher, whose blocks give features of a noised latent, and a trained head on each of
some blocks. The student's predictions and real latents are noised alike before they are judged.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from .text import Text
from .trigflow import SIGMA_DATA, TrigFlowTransformer


REFERENCE_BLOCKS = (2, 8, 14, 19)  # Sana-Sprint's, for its teachers of 20 and of 28 blocks


def head_blocks(num_layers: int, blocks: Sequence[int] | None = None) -> tuple[int, ...]:
    """Choose the teacher's blocks that get a head.

    Args:
        num_layers: the teacher's number of blocks.
        blocks: wanted blocks, counted from 0; None for `REFERENCE_BLOCKS`, drawn together evenly where the teacher has
            fewer blocks than they take.

    Returns:
        The blocks, ascending, each once.

    Raises:
        ValueError: if `blocks` is empty or names a block that the teacher does not have.
    """
    if blocks is None:
        scale = min(1.0, (num_layers - 1) / REFERENCE_BLOCKS[-1])
        return tuple(sorted({round(block * scale) for block in REFERENCE_BLOCKS}))
    if not blocks or min(blocks) < 0 or max(blocks) >= num_layers:
        raise ValueError(
            f"`blocks` is {list(blocks)}, but it must name one or more of the teacher's blocks, 0 to {num_layers - 1}."
        )
    return tuple(sorted(set(blocks)))


class _LastBlockDone(Exception):
    """Ends a forward whose remaining blocks nobody looks at."""


def block_features(
    teacher: TrigFlowTransformer,
    blocks: Sequence[int],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    text: Text,
    guidance_scale: torch.Tensor,
    *,
    sigma_data: float = SIGMA_DATA,
) -> dict[int, torch.Tensor]:
    """Run the teacher up to the last of some blocks and keep what they give; gradients flow to the latents.

    Args:
        teacher: the frozen network, held as it is; used without guidance unless it embeds it.
        blocks: as `head_blocks` gives them.
        latents: x_t, (rows, channels, height, width).
        timesteps: t in radians, (rows,).
        text: of the rows' prompts.
        guidance_scale: classifier-free guidance weight, (rows,), for a teacher that embeds it.
        sigma_data: standard deviation of the latents.

    Returns:
        Hidden states by block, (rows, tokens, dim), in the teacher's dtype.
    """
    features: dict[int, torch.Tensor] = {}

    def keep(block: int, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        # A block that changes the text too gives it first
        features[block] = output if isinstance(output, torch.Tensor) else output[1]

    def stop(*_: object) -> None:
        raise _LastBlockDone

    network = teacher.transformer
    # What follows the last of the blocks is told to stop before it begins. The block itself cannot: under gradient
    # checkpointing it would leave its own recorded forward by an exception.
    of_network = [*teacher.backbone.blocks(network), teacher.backbone.after_blocks(network)]
    following = of_network[max(blocks) + 1]
    handles = [
        of_network[block].register_forward_hook(lambda _, __, output, block=block: keep(block, output))
        for block in blocks
    ]
    handles.append(following.register_forward_pre_hook(stop))
    guidance = guidance_scale if teacher.guidance_embeds else None
    try:
        teacher(latents / sigma_data, timesteps, **text.arguments(), guidance=guidance)
    except _LastBlockDone:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return features


class _NormalizedConv(nn.Module):
    """Convolution over the tokens, batch norm over small groups of rows, leaky ReLU."""

    def __init__(self, channels: int, kernel_size: int, norm_rows: int) -> None:
        super().__init__()
        self.conv = spectral_norm(
            nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")
        )
        # The reference's: statistics of at most `norm_rows` rows, never running ones.
        self.norm = nn.BatchNorm1d(channels, track_running_stats=False)
        self.norm_rows = norm_rows

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv(hidden_states)
        hidden_states = torch.cat([self.norm(rows) for rows in hidden_states.split(self.norm_rows)])
        return F.leaky_relu(hidden_states, 0.2)


class _Head(nn.Module):
    """A verdict per token of one block's features."""

    def __init__(self, channels: int, norm_rows: int) -> None:
        super().__init__()
        self.pointwise = _NormalizedConv(channels, 1, norm_rows)
        self.mixing = _NormalizedConv(channels, 9, norm_rows)
        self.verdict = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.pointwise(hidden_states)
        hidden_states = (hidden_states + self.mixing(hidden_states)) / math.sqrt(2)
        return self.verdict(hidden_states).squeeze(1)


class DiscriminatorHeads(nn.Module):
    """The trained part of the discriminator: per block a 1x1 convolution, a residual one of 9 taps, and a verdict.

    All convolutions have spectral norm 1 and run over the token axis. They belong to training only.

    Args:
        inner_dim: size of the teacher's hidden states.
        blocks: the teacher's blocks that get a head, as `head_blocks` gives them.
        norm_rows: rows that share the statistics of a batch norm, 8 in the reference; at 1, a row's verdict does not
            depend on the rows beside it.
    """

    def __init__(self, inner_dim: int, blocks: Sequence[int], norm_rows: int = 8) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.heads = nn.ModuleDict({str(block): _Head(inner_dim, norm_rows) for block in blocks})

    def forward(self, *features: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Judge batches of features; no statistics are shared between real ones and fake ones.

        Args:
            features: each from `block_features`, (rows, tokens, inner_dim) by block. All in one call, as
                DistributedDataParallel wants one forward per backward.

        Returns:
            Per batch its verdicts, above 0 for real, (rows, blocks * tokens).
        """
        return tuple(self._judge(batch) for batch in features)

    def _judge(self, features: Mapping[int, torch.Tensor]) -> torch.Tensor:
        dtype = next(self.parameters()).dtype
        verdicts = [head(features[int(block)].to(dtype).transpose(1, 2)) for block, head in self.heads.items()]
        return torch.cat(verdicts, dim=1)


def frozen_verdicts(heads: DiscriminatorHeads, features: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Judge features for the student's sake: gradients flow to the features, and nothing of the heads changes.

    Args:
        heads: the heads, not wrapped.
        features: from `block_features`, (rows, tokens, inner_dim) by block.

    Returns:
        Verdicts, above 0 for real, (rows, blocks * tokens).
    """
    # A forward in training mode moves spectral norm's power iteration along: it moves copies.
    state = {name: parameter.detach() for name, parameter in heads.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in heads.named_buffers()}
    (verdicts,) = torch.func.functional_call(heads, state, (features,))
    return verdicts


def hinge_generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """Evaluate the student's adversarial loss, -mean D(fake).

    Args:
        fake: verdicts on the student's predictions, any shape.

    Returns:
        The loss, a scalar in float32 or wider.
    """
    return -fake.to(torch.promote_types(fake.dtype, torch.float32)).mean()


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Evaluate the heads' loss, (mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))) / 2.

    Args:
        real: verdicts on real latents, any shape.
        fake: verdicts on the student's predictions, and on real latents under other prompts where those count as fake,
            any shape.

    Returns:
        The loss, a scalar in float32 or wider.
    """
    wide = torch.promote_types(real.dtype, torch.float32)
    return 0.5 * (F.relu(1 - real.to(wide)).mean() + F.relu(1 + fake.to(wide)).mean())
