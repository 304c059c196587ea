"""Queries and keys of a plain Sana normalised, q -> w q / rms(q), by weights that leave its attention nearly as it is.

Sana-Sprint (arXiv 2503.09641) gives its teachers these norms for the sake of stable gradients in consistency training;
a plain Sana 1.0 has none. A weight for every channel cannot undo the division by a length that differs from token to
token: least squares make the best of it, and what they leave is for the alignment of `dense_time`.

    w_c = argmin E (w q_c / rms(q) - q_c)^2 = E[u_c q_c] / E[u_c^2],  u = q / rms(q)

The mean is over tokens on the teacher's own trajectories, for keys alike. Self-attention of a Sana is linear,
sum_j (relu(q) . relu(k_j)) v_j / sum_j relu(q) . relu(k_j). A query's length cancels there: its weights are 1, and
exact. Of its keys only what the ReLU passes counts.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from torch import nn

from .dense_time import branch_inputs
from .flow import FlowTransformer
from .rows import TrainingRows
from .text import Text


QK_NORM = "rms_norm_across_heads"  # as the teachers of Sana 1.5 and Sana-Sprint have it, by diffusers' name
EPS = 1e-5  # of the norms, diffusers' own


@torch.no_grad()
def fit_norms(network: FlowTransformer, rows: Sequence[TrainingRows], negative_text: Text) -> dict[str, torch.Tensor]:
    """Fit the weights of norms to a network that has none, by the least squares above; one pass over the rows.

    Args:
        network: v of a Sana without norms, or its v' in dense time.
        rows: of `record_branches`, in parts of what one pass is to see.
        negative_text: of the negative prompt.

    Returns:
        Weights by their names in the network with norms, (inner_dim,), on the network's device and in its dtype.
    """
    attentions = dict(_attentions(network.transformer))
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, attention: Attention, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
        """Add what one attention sees."""
        hidden, bias = args[0], kwargs.get("attention_mask")
        seen = {"q": hidden, "k": kwargs["encoder_hidden_states"]} if attention.is_cross_attention else {"k": hidden}
        for part, states in seen.items():
            values = getattr(attention, f"to_{part}")(states).flatten(0, 1)
            if part == "k" and bias is not None:
                values = values[bias.flatten() == 0]  # no padding
            unit = F.rms_norm(values, values.shape[-1:], eps=EPS)
            if not attention.is_cross_attention:
                values, unit = values.relu(), unit.relu()
            found = torch.stack([(unit * values).sum(0), unit.square().sum(0)]).cpu().double()
            weight = f"{name}.norm_{part}.weight"
            sums[weight] = sums.get(weight, 0) + found

    hooks = [
        attention.register_forward_pre_hook(partial(add, name), with_kwargs=True)
        for name, attention in attentions.items()
    ]
    try:
        for part in rows:
            sample, s, text = branch_inputs(part, negative_text)
            network(sample, s, **text.arguments())
    finally:
        for hook in hooks:
            hook.remove()
    exact = {
        f"{name}.norm_q.weight": torch.ones(attention.inner_dim)
        for name, attention in attentions.items()
        if not attention.is_cross_attention
    }
    fitted = {name: _ratio(*pair) for name, pair in sums.items()}
    weight = network.transformer.proj_out.weight
    return {name: value.to(weight) for name, value in {**exact, **fitted}.items()}


def _ratio(products: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """E[u_c q_c] / E[u_c^2], by channel; that of all channels where a ReLU has passed nothing."""
    return torch.where(squares > 0, products / squares, products.sum() / squares.sum())


def with_qk_norm(network: FlowTransformer, weights: Mapping[str, torch.Tensor]) -> FlowTransformer:
    """Make a network of the very parameters of another one, and of norms of its queries and keys.

    Args:
        network: v of a Sana without norms, or v'; it is left as it is.
        weights: of `fit_norms`; they are copied.

    Returns:
        The network with norms, whose config says so.
    """
    transformer = network.transformer
    normalised = copy.deepcopy(transformer, {id(part): part for part in transformer.parameters()})
    for name, attention in _attentions(normalised):
        for part in ("norm_q", "norm_k"):
            weight = weights[f"{name}.{part}.weight"]
            norm = RMSNorm(len(weight), eps=EPS)
            norm.weight = nn.Parameter(weight.clone(), requires_grad=False)
            setattr(attention, part, norm)
    normalised.register_to_config(qk_norm=QK_NORM)
    return FlowTransformer(normalised, network.timestep_scale)


def train_norms(transformer: nn.Module) -> None:
    """Give a network norms of its own that train, in place: adapters (LoRA) share all else with their base.

    Args:
        transformer: with norms of queries and keys, of which another network may hold the same parameters.
    """
    for _, attention in _attentions(transformer):
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight = nn.Parameter(norm.weight.detach().clone())


def _attentions(transformer: nn.Module) -> Iterator[tuple[str, Attention]]:
    """The attention layers of a Sana, by their module paths."""
    return ((name, part) for name, part in transformer.named_modules() if isinstance(part, Attention))
