"""The arguments of a pipeline's call: what cannot be drawn is refused by name, before anything is computed."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch


MAX_FLOAT32 = torch.finfo(torch.float32).max  # networks and samplers compute with no larger numbers


def whole_number(name: str, value: Any, minimum: int = 1) -> int:
    """Take a whole number of any library.

    Args:
        name: of the argument.
        value: an `int`, a NumPy integer or a tensor of one.
        minimum: the smallest that will do.

    Returns:
        The number.

    Raises:
        ValueError: for anything else, `True` and 2.0 among it.
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise ValueError(f"`{name}` is {value!r}, but has to be a whole number of at least {minimum}.")
    return number


def real_number(name: str, value: Any) -> float:
    """Take a finite number of any library.

    Args:
        name: of the argument.
        value: a `float`, an `int`, a NumPy number or a tensor of one.

    Returns:
        The number.

    Raises:
        ValueError: for anything else, NaN, infinity, what float32 cannot hold and `True` among it.
    """
    try:
        number = math.nan if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not abs(number) <= MAX_FLOAT32:  # nor where it is none
        raise ValueError(f"`{name}` is {value!r}, but has to be a finite number.")
    return number


def check_flags(**flags: Any) -> None:
    """Refuse what is neither true nor false: the string "no" would count as true.

    Args:
        flags: arguments by name.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"`{name}` is {value!r}, but has to be True or False.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices.

    Args:
        name: of the argument.
        value: given.
        choices: that there are.

    Raises:
        ValueError: naming the argument and the choices.
    """
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but has to be one of {', '.join(map(repr, choices))}.")


def check_prompt(prompt: Any) -> None:
    """Refuse what is neither a prompt nor several.

    Args:
        prompt: a string or a list of strings.

    Raises:
        ValueError: for anything else, an empty list among it.
    """
    if isinstance(prompt, str):
        _check_text("prompt", prompt)
        return
    if not isinstance(prompt, list):
        raise ValueError(f"`prompt` has to be of type `str` or `list` but is {type(prompt)}")
    if not prompt:
        raise ValueError("`prompt` is an empty list: give at least one prompt.")
    for number, text in enumerate(prompt):
        if not isinstance(text, str):
            raise ValueError(f"`prompt[{number}]` is {text!r}, but has to be a string.")
        _check_text(f"prompt[{number}]", text)


def _check_text(name: str, text: str) -> None:
    """Refuse half a character, which a program makes of bytes that are no UTF-8 and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` is {text!r}, which is no text in UTF-8: {error.reason}.") from error


def check_instruction(instruction: Any) -> None:
    """Refuse what is not a list of lines: a string would be taken apart into its characters.

    Args:
        instruction: a list of strings, or None.

    Raises:
        ValueError: for anything else.
    """
    lines = isinstance(instruction, list | tuple) and all(isinstance(line, str) for line in instruction)
    if instruction is not None and not lines:
        raise ValueError(f"`complex_human_instruction` is {instruction!r}, but has to be a list of strings, or None.")
    for line in instruction or ():
        _check_text("complex_human_instruction", line)


def check_embeddings(prompt_embeds: Any, prompt_attention_mask: Any, channels: int) -> None:
    """Refuse embeddings that a network cannot read, and a mask that is another's.

    Args:
        prompt_embeds: to be (prompts, tokens, `channels`).
        prompt_attention_mask: to be (prompts, tokens) of 1 for tokens and 0 for padding.
        channels: that the network reads.

    Raises:
        ValueError: naming the argument.
    """
    check_floats("prompt_embeds", prompt_embeds)
    shape = tuple(prompt_embeds.shape)
    if len(shape) != 3 or 0 in shape or shape[2] != channels:
        raise ValueError(f"`prompt_embeds` has the shape {shape}, but has to be (prompts, tokens, {channels}).")
    if not isinstance(prompt_attention_mask, torch.Tensor):
        raise ValueError("`prompt_attention_mask` has to be a tensor of 1 for tokens and 0 for padding.")
    if tuple(prompt_attention_mask.shape) != shape[:2]:
        raise ValueError(
            f"`prompt_attention_mask` has the shape {tuple(prompt_attention_mask.shape)}, but has to be {shape[:2]},"
            " as that of `prompt_embeds`."
        )
    is_token = prompt_attention_mask == 1
    if not (is_token | (prompt_attention_mask == 0)).all() or not is_token.any(dim=1).all():
        raise ValueError("`prompt_attention_mask` has to hold 1 for tokens, of which a prompt has one, and 0 else.")


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Refuse noise that is not the noise of the pictures to make.

    Args:
        latents: given.
        shape: that they need, (images, channels, height, width).

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(latents, torch.Tensor) and tuple(latents.shape) != shape:
        raise ValueError(
            f"`latents` has the shape {tuple(latents.shape)}, but these pictures are made of {shape} (images,"
            " channels, height, width): give latents of that shape, or other `height` and `width`."
        )
    check_floats("latents", latents)


def check_floats(name: str, tensor: Any) -> None:
    """Refuse what is not a tensor of finite floating-point numbers.

    Args:
        name: of the argument.
        tensor: given.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"`{name}` is of {kind}, but has to be a tensor of floating-point numbers.")
    if not tensor.isfinite().all():
        raise ValueError(f"`{name}` holds NaN or infinity, of which no picture can be made.")


def check_generator(generator: Any, images: int) -> None:
    """Refuse what is not a source of noise, and a list of more or fewer than there are pictures.

    Args:
        generator: a generator, one for each picture, or None.
        images: number of pictures to make.

    Raises:
        ValueError: naming the argument.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(
            f"`generator` is {generator!r}, but has to be a `torch.Generator`, such as"
            " `torch.Generator().manual_seed(0)`, or a list of one for each picture."
        )
    if len(generator) != images:
        raise ValueError(
            f"`generator` is a list of generators of length {len(generator)}, but {images} pictures are to be made:"
            " give one for each, or one for all."
        )


def check_attention_kwargs(attention_kwargs: Any) -> float | None:
    """Refuse what is not a dict, and a scale of LoRA layers that is no number.

    Args:
        attention_kwargs: a dict or None.

    Returns:
        The scale, if there is one.

    Raises:
        ValueError: naming the argument.
    """
    if attention_kwargs is None:
        return None
    if not isinstance(attention_kwargs, Mapping):
        raise ValueError(f"`attention_kwargs` is {attention_kwargs!r}, but has to be a dict.")
    scale = attention_kwargs.get("scale")
    return None if scale is None else real_number("attention_kwargs['scale']", scale)


def check_callback(callback: Any, tensor_inputs: Any) -> None:
    """Refuse a callback that cannot be called, and names of tensors that are no list of strings.

    Args:
        callback: `callback_on_step_end`.
        tensor_inputs: `callback_on_step_end_tensor_inputs`.

    Raises:
        ValueError: naming the argument.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` is {callback!r}, but has to be callable.")
    if not isinstance(tensor_inputs, list | tuple) or not all(isinstance(name, str) for name in tensor_inputs):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` is {tensor_inputs!r}, but has to be a list of strings."
        )


def checked_callback(callback: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Let a callback return nothing, and refuse what the next step could not go on with.

    Args:
        callback: `callback_on_step_end`.

    Returns:
        The same, which raises ValueError where the callback returns anything but a dict or None, or a tensor of
        another shape than the one that it was given, or one that the next step takes and it was not given.
    """

    def checked(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        returned = callback(pipeline, step, timestep, tensors)
        if returned is None:
            return {}
        if not isinstance(returned, dict):
            raise ValueError(
                f"`callback_on_step_end` returned a {type(returned).__name__}, but has to return a dict of the tensors"
                " that it changes, or nothing."
            )
        for name in returned.keys() & {*pipeline._callback_tensor_inputs} - shapes.keys():
            raise ValueError(
                f"`callback_on_step_end` returned {name!r}, which it was not given: name it in"
                " `callback_on_step_end_tensor_inputs`."
            )
        for name in shapes.keys() & returned.keys():
            tensor = returned[name]
            if not isinstance(tensor, torch.Tensor) or tensor.shape != shapes[name]:
                raise ValueError(
                    f"`callback_on_step_end` returned {name!r} that is not a tensor of the shape"
                    f" {tuple(shapes[name])}, which it was given."
                )
        return returned

    return checked
