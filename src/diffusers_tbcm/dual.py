"""Dual numbers whose primal part carries a gradient graph and whose tangent part carries none.

One forward pass of a network on them gives its output, ready for backward, and the derivative of the output along the
tangents of the inputs. torch.func.jvp would need a pass of its own, which computes every value a second time and
multiplies by derivatives of the weights that are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


# Attention scores that exist at a time when a tangent passes scaled_dot_product_attention: 256 MiB of float32. Set it
# lower for less memory.
MAX_ATTENTION_SCORES = 2**26

aten = torch.ops.aten


@dataclass(eq=False)
class Dual:
    """A tensor and its derivative along a direction; torch functions and Tensor methods take it for a tensor.

    The primal part is computed by exactly the operations that a plain tensor would see, with their gradient graph; the
    tangent part under no_grad, as the training target it is.

    Args:
        primal: the value, any shape.
        tangent: its derivative, the shape of `primal`.
    """

    primal: torch.Tensor
    tangent: torch.Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(func.__name__, func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(torch.Tensor, name)):
            method = lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)  # noqa: E731
            return lambda *args, **kwargs: _call(name, method, (self, *args), kwargs)
        value = getattr(self.primal, name)  # such as shape, dtype, device; a tensor, as mT is, has a tangent
        return _call(name, lambda x: getattr(x, name), (self,), {}) if isinstance(value, torch.Tensor) else value

    def __getitem__(self, index: Any) -> Dual:
        return _call("getitem", torch.Tensor.__getitem__, (self, index), {})

    def __add__(self, other: Any) -> Dual:
        return _call("add", torch.add, (self, other), {})

    def __radd__(self, other: Any) -> Dual:
        return _call("add", torch.add, (self, other), {})

    def __sub__(self, other: Any) -> Dual:
        return _call("sub", torch.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Dual:
        return _call("rsub", torch.rsub, (self, other), {})

    def __mul__(self, other: Any) -> Dual:
        return _call("mul", torch.mul, (self, other), {})

    def __rmul__(self, other: Any) -> Dual:
        return _call("mul", torch.mul, (self, other), {})

    def __matmul__(self, other: Any) -> Dual:
        return _call("matmul", torch.matmul, (self, other), {})

    def __truediv__(self, other: Any) -> Dual:
        return _call("div", torch.div, (self, other), {})

    def __rtruediv__(self, other: Any) -> Dual:
        return other * self**-1

    def __pow__(self, exponent: Any) -> Dual:
        return _call("pow", torch.pow, (self, exponent), {})

    def __neg__(self) -> Dual:
        return _call("neg", torch.neg, (self,), {})


def _call(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    output = func(*[_primal(value) for value in args], **{key: _primal(value) for key, value in kwargs.items()})
    rule = RULES.get(name, _by_forward_mode)
    with torch.no_grad():
        tangent = rule(func, output, *args, **kwargs)
    if isinstance(output, torch.Tensor):
        return Dual(output, tangent)
    return tuple(Dual(*parts) for parts in zip(output, tangent, strict=True))


# Dual numbers pass the hooks of distributed modules as the two tensors that they are.
register_pytree_node(Dual, lambda dual: ([dual.primal, dual.tangent], None), lambda parts, _: Dual(*parts))


def _is_dual(value: object) -> bool:
    return isinstance(value, Dual)


def _primal(value: Any) -> Any:
    if isinstance(value, Dual):
        return value.primal
    return type(value)([_primal(element) for element in value]) if type(value) in (list, tuple) else value


def _sum(*terms: torch.Tensor | None) -> torch.Tensor:
    first, *others = (term for term in terms if term is not None)
    return sum(others, start=first)


# Rules: the tangent of a function's output from the function, the primal output, and the arguments, some of them dual.
# They run under no_grad.


def _by_forward_mode(func: Callable[..., Any], output: Any, *args: Any, **kwargs: Any) -> Any:
    """Any function, by PyTorch's forward mode: right, but it computes the primal part again."""
    flat, structure = tree_flatten((args, kwargs), is_leaf=_is_dual)
    places = [place for place, value in enumerate(flat) if isinstance(value, Dual)]

    def of_duals(*values: torch.Tensor) -> Any:
        arguments = list(map(_primal, flat))
        for place, value in zip(places, values, strict=True):
            arguments[place] = value
        args, kwargs = tree_unflatten(arguments, structure)
        return func(*args, **kwargs)

    primals = tuple(flat[place].primal.detach() for place in places)
    return torch.func.jvp(of_duals, primals, tuple(flat[place].tangent for place in places))[1]


def _linear_in_first(func: Callable[..., Any], output: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return func(x.tangent, *map(_primal, args), **kwargs)  # type_as is given a tensor whose dtype it takes


def _join(func: Callable[..., Any], output: torch.Tensor, tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """cat and stack: what is no dual number among the parts has the tangent 0."""
    parts = [part.tangent if isinstance(part, Dual) else torch.zeros_like(part) for part in tensors]
    return func(parts, *args, **kwargs)


def _einsum(func: Callable[..., Any], output: torch.Tensor, equation: str, *operands: Any) -> torch.Tensor:
    terms = []
    for place, operand in enumerate(operands):
        if isinstance(operand, Dual):
            before, after = operands[:place], operands[place + 1 :]
            terms.append(func(equation, *map(_primal, before), operand.tangent, *map(_primal, after)))
    return _sum(*terms)


def _add(func: Callable[..., Any], output: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    if isinstance(a, Dual) and isinstance(b, Dual):
        return func(a.tangent, b.tangent)
    # The other term has no derivative but may have broadcast this one.
    tangent = a.tangent if isinstance(a, Dual) else b.tangent
    return tangent.to(output.dtype).expand_as(output)


def _sub(func: Callable[..., Any], output: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    if isinstance(a, Dual) and isinstance(b, Dual):
        return func(a.tangent, b.tangent)
    tangent = a.tangent if isinstance(a, Dual) else -b.tangent
    return tangent.to(output.dtype).expand_as(output)


def _rsub(func: Callable[..., Any], output: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    return _sub(torch.sub, output, b, a)


def _mul(func: Callable[..., Any], output: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    return _sum(
        func(a.tangent, _primal(b)) if isinstance(a, Dual) else None,
        func(_primal(a), b.tangent) if isinstance(b, Dual) else None,
    )


def _div(func: Callable[..., Any], output: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    if not isinstance(b, Dual):
        return func(a.tangent, b)
    numerator = -output * b.tangent if not isinstance(a, Dual) else a.tangent - output * b.tangent
    return func(numerator, b.primal)


def _pow(func: Callable[..., Any], output: torch.Tensor, x: Any, exponent: Any) -> torch.Tensor:
    if not isinstance(exponent, (int, float)):
        return _by_forward_mode(func, output, x, exponent)
    return exponent * x.primal ** (exponent - 1) * x.tangent


def _affine(func: Callable[..., Any], output: torch.Tensor, x: Any, weight: Any, bias: Any = None, *args: Any) -> Any:
    return func(x.tangent, weight, None, *args)


def _layer_norm(
    func: Callable[..., Any],
    output: torch.Tensor,
    x: Any,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    primal, tangent = x.primal.to(output.dtype), x.tangent.to(output.dtype)
    _, mean, rstd = torch.native_layer_norm(primal, normalized_shape, None, None, eps)
    # The Jacobian of plain standardisation is symmetric, so the backward kernel applies it.
    only_input = [True, False, False]
    tangent = aten.native_layer_norm_backward(tangent, primal, normalized_shape, mean, rstd, None, None, only_input)[0]
    return tangent if weight is None else tangent * weight


def _rms_norm(
    func: Callable[..., Any],
    output: torch.Tensor,
    x: Any,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """y = r x w with r = 1 / sqrt(mean x^2 + eps): y' = r (x' - r^2 x mean(x x')) w."""
    wide = torch.promote_types(output.dtype, torch.float32)
    primal, tangent = x.primal.to(wide), x.tangent.to(wide)
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    r = torch.rsqrt(primal.square().mean(dims, keepdim=True) + eps)
    tangent = r * (tangent - r**2 * primal * (primal * tangent).mean(dims, keepdim=True))
    return (tangent if weight is None else tangent * weight).to(output.dtype)


def _pad(
    func: Callable[..., Any],
    output: torch.Tensor,
    x: Any,
    pad: Any,
    mode: str = "constant",
    value: float | None = None,
) -> torch.Tensor:
    return func(x.tangent, pad, mode=mode, value=None)


def _dropout(
    func: Callable[..., Any],
    output: torch.Tensor,
    x: Any,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    if training and p > 0:
        raise ValueError(f"`p` is {p}: a tangent cannot follow dropout. Set the network's dropout to 0.")
    return x.tangent


def _silu(func: Callable[..., Any], output: torch.Tensor, x: Any, inplace: bool = False) -> torch.Tensor:
    # Element by element a function's Jacobian is diagonal, so its backward kernel applies it.
    return aten.silu_backward(x.tangent, x.primal)


def _gelu(func: Callable[..., Any], output: torch.Tensor, x: Any, approximate: str = "none") -> torch.Tensor:
    return aten.gelu_backward(x.tangent, x.primal, approximate=approximate)


def _sin(func: Callable[..., Any], output: torch.Tensor, x: Any) -> torch.Tensor:
    return torch.cos(x.primal) * x.tangent


def _cos(func: Callable[..., Any], output: torch.Tensor, x: Any) -> torch.Tensor:
    return -torch.sin(x.primal) * x.tangent


def _relu(func: Callable[..., Any], output: torch.Tensor, x: Any, inplace: bool = False) -> torch.Tensor:
    return aten.threshold_backward(x.tangent, x.primal, 0)


def _rsqrt(func: Callable[..., Any], output: torch.Tensor, x: Any) -> torch.Tensor:
    return -0.5 * output**3 * x.tangent


def _sqrt(func: Callable[..., Any], output: torch.Tensor, x: Any) -> torch.Tensor:
    return 0.5 / output * x.tangent


def _attention(
    func: Callable[..., Any],
    output: torch.Tensor,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """o = p v with p = softmax(s): o' = p' v + p v', p' = p * s' - p rowsum(p * s'), for some queries at a time."""
    if dropout_p > 0 or is_causal or enable_gqa:
        raise ValueError("A tangent cannot follow attention with dropout, a causal mask or grouped queries.")
    wide = torch.promote_types(output.dtype, torch.float32)
    q, k, v = (_primal(part).to(wide) for part in (query, key, value))
    q_tangent, k_tangent, v_tangent = (
        part.tangent.to(wide) if isinstance(part, Dual) else None for part in (query, key, value)
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chunk = max(1, MAX_ATTENTION_SCORES // (output.shape[:-2].numel() * k.shape[-2]))
    tangents = []
    with torch.autocast(output.device.type, enabled=False):
        for start in range(0, output.shape[-2], chunk):
            part = slice(start, start + chunk)
            p = q[..., part, :] @ k.mT * scale
            if attn_mask is not None:
                bias = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., part, :]
                p = p.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else p + bias
            p = p.softmax(-1)
            terms = []
            if q_tangent is not None or k_tangent is not None:
                s_tangent = _sum(
                    q_tangent[..., part, :] @ k.mT if q_tangent is not None else None,
                    q[..., part, :] @ k_tangent.mT if k_tangent is not None else None,
                )
                s_tangent = p * s_tangent * scale
                terms.append((s_tangent - p * s_tangent.sum(-1, keepdim=True)) @ v)
            if v_tangent is not None:
                terms.append(p @ v_tangent)
            tangents.append(_sum(*terms).to(output.dtype))
    return torch.cat(tangents, dim=-2)


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            "chunk", "contiguous", "expand", "flatten", "float", "getitem", "mean", "movedim", "mT", "neg",
            "permute", "repeat", "reshape", "split", "split_with_sizes", "squeeze", "sum", "to", "transpose",
            "type_as", "unbind", "unflatten", "unsqueeze", "view", "view_as_complex", "view_as_real",
        ),
        _linear_in_first,
    ),
    **dict.fromkeys(("cat", "stack"), _join),
    "einsum": _einsum,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    **dict.fromkeys(("mul", "matmul"), _mul),
    "div": _div,
    "pow": _pow,
    **dict.fromkeys(("linear", "conv2d"), _affine),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "pad": _pad,
    "dropout": _dropout,
    "scaled_dot_product_attention": _attention,
    "silu": _silu,
    "gelu": _gelu,
    "sin": _sin,
    "cos": _cos,
    "relu": _relu,
    "rsqrt": _rsqrt,
    "sqrt": _sqrt,
}  # fmt: skip


def checkpoint_dual(function: Callable[..., Any], *args: Any) -> Any:
    """Gradient checkpointing through dual numbers: backward computes the primal part again, and no tangent.

    For `enable_gradient_checkpointing` of a diffusers model.

    Args:
        function: what to checkpoint; it returns a tensor or a tuple of tensors, dual where an argument is.
        args: its arguments, dual or not.

    Returns:
        What `function` returns.
    """
    duals: tuple[Any, ...] | None = args
    outputs: list[Any] = []

    def primal_of(*primals: Any) -> Any:
        nonlocal duals
        if duals is None:  # in backward
            return function(*primals)
        output, duals = function(*map(_with_primal, duals, primals)), None
        outputs.extend(output if isinstance(output, tuple) else [output])
        primal = tuple(map(_primal, outputs))
        return primal if isinstance(output, tuple) else primal[0]

    primal = checkpoint(primal_of, *map(_primal, args), use_reentrant=False)
    primals = primal if isinstance(primal, tuple) else (primal,)
    output = tuple(map(_with_primal, outputs, primals))
    outputs.clear()  # what the graph holds must not hold the tangents
    return output if isinstance(primal, tuple) else output[0]


def _with_primal(value: Any, primal: Any) -> Any:
    return Dual(primal, value.tangent) if isinstance(value, Dual) else primal
