"""A pretend accelerator: a device that is not the CPU, keeps its tensors in the CPU's memory and computes there.

`install` makes torch's private-use backend out of the CPU's kernels, in Python, so that autograd, views, autocast,
optimisers, accelerate and diffusers' offloading meet an ordinary device. What the device is for:

- It refuses what mixes devices as CUDA does, by torch's own table of the operations that check for themselves: those
  take numbers on the CPU, and an index may lie there. A generator has to be of the tensor's device.
- It counts what makes the host wait for the device, by the function of ours that asks for it: values read, copies
  that block, results whose shape depends on values.
- What is copied to the host without waiting holds no values until something has waited.

It cannot show kernels and their precision, the device's memory and its limits, operations or dtypes that a real
device lacks, streams beside the one, or the order of work in it: everything but copies to the host is done at once.
Attention is computed by its formula. Memory that is pinned is only marked so. A parameter that something holds
weakly, as fake tensors do, cannot be moved, and nor can compiled code run there.

It is for a process of its own: a backend cannot be taken back, and autograd starts its threads once.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchgen
from accelerate import Accelerator
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


NAME = "pretend"
KEY = "PrivateUse1"
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
DLPACK_KINDS = {"cpu": 1, NAME: 12}  # DLPack's kDLCPU and kDLExtDev, which is torch's private-use device
ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / part) for part in ("src/diffusers_tbcm", "examples", "benchmarks"))

# The shape of what these give depends on values, or they give a number: the host has to wait for it.
WAITING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero", "unique_consecutive",
    "unique_dim",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# What autocast computes in its low precision and in float32, of CUDA's lists what networks use.
AUTOCAST_LOW = [
    "addbmm", "addmm", "addmv", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d.input", "convolution", "einsum", "linear", "matmul", "mm", "mv", "scaled_dot_product_attention",
]  # fmt: skip
AUTOCAST_FLOAT32 = [
    "acos", "asin", "cosh", "cosine_similarity", "cumprod", "cumsum", "erfinv", "exp", "expm1", "group_norm",
    "l1_loss", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax.int", "mse_loss", "norm.Scalar",
    "native_layer_norm", "norm.ScalarOpt_dim", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "prod",
    "reciprocal", "rsqrt", "sinh", "smooth_l1_loss", "softmax.int", "softplus", "sum", "sum.dim_IntList", "tan",
]  # fmt: skip

AUTOCAST_WIDEST = ["addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "index_put", "scatter_add", "vdot"]

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

waits: Counter[str] = Counter()  # by the function of ours that asks, and what for
_libraries: list[torch.library.Library] = []  # registrations live as long as these
_generators: set[int] = set()  # the device's, by address
_copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # on the way to the host: where to, and what


class MixedDevices(RuntimeError):
    """An operation was given tensors of the CPU and of the device, or the generator of another device."""


def relabel(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Give the same memory as a tensor of the other device."""
    capsule = torch._C._to_dlpack(tensor)
    kind = ctypes.cast(_pointer(capsule, b"dltensor") + 8, ctypes.POINTER(ctypes.c_int32))
    kind[0], kind[1] = DLPACK_KINDS[device], 0
    return torch._C._from_dlpack(capsule)


def _asked_by() -> str:
    """Where in our sources the operation comes from; autograd's own thread has no such place."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _wait(what: str) -> None:
    """The host waits until the device has done all that was queued: what was on its way has arrived."""
    waits[f"{_asked_by()}: {what}"] += 1
    _arrive(len(_copies))


def _arrive(count: int) -> None:
    """Let the first copies to the host arrive that are on their way."""
    for target, values in _copies[:count]:
        target.copy_(values)
    del _copies[:count]


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _lower(value: Any, lowered: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Arguments on the CPU; `lowered` takes pairs of a tensor on the CPU and on the device."""
    if isinstance(value, torch.Tensor):
        if value.device.type != NAME:
            return value
        if value.numel():
            on_cpu = relabel(value, "cpu")
        else:  # may be what a result is to be written into, whose shape it then takes
            on_cpu = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
        lowered.append((on_cpu, value))
        return on_cpu
    if isinstance(value, list | tuple):
        return [_lower(one, lowered) for one in value]
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _raise(value: Any, lowered: list[tuple[torch.Tensor, torch.Tensor]], is_view: bool) -> Any:
    """Results on the device: what was changed in place is the argument itself, a view shares its storage."""
    if isinstance(value, list | tuple):
        return type(value)(_raise(one, lowered, is_view) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    for on_cpu, on_device in lowered:
        if value is on_cpu:
            return on_device
    if is_view and value.dtype == lowered[0][1].dtype:
        on_cpu, on_device = lowered[0]
        offset = (value.data_ptr() - on_cpu.data_ptr()) // value.element_size() if value.numel() else 0
        return _as_strided(on_device, value.size(), value.stride(), on_device.storage_offset() + offset)
    return relabel(value, NAME)


def _as_strided(
    tensor: torch.Tensor, size: torch.Size, stride: tuple[int, ...], storage_offset: int | None = None
) -> torch.Tensor:
    offset = tensor.storage_offset() if storage_offset is None else storage_offset
    return torch.ops.aten.alias(tensor).as_strided_(size, stride, offset)


def _lenient_operations() -> set[str]:
    """The operations that check devices themselves, as torch's table says: they take numbers on the CPU."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = table.read_text(encoding="utf-8").split("\n- func: ")[1:]
    return {entry.partition("(")[0] for entry in entries if re.search(r"^  device_check: NoCheck", entry, re.M)}


def _check_devices(op: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any], lenient: bool) -> None:
    """Refuse what CUDA refuses."""
    name = op._schema.name.removeprefix("aten::")
    on_cpu = [tensor for tensor in _tensors((*args, *kwargs.values())) if tensor.device.type == "cpu"]
    if not on_cpu:
        return
    if name in INDEXING:
        values = args[2] if len(args) > 2 else args[0]
        if args[0].device.type == NAME and (values.device.type == NAME or values.ndim == 0):
            return _wait("an index from the CPU")
    written = [
        tensor
        for argument, value in zip(op._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors([value])
    ]
    if (
        lenient
        and all(tensor.ndim == 0 for tensor in on_cpu)
        and all(tensor.device.type == NAME for tensor in written)
    ):
        return None
    shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in _tensors((*args, *kwargs.values())))
    raise MixedDevices(f"Expected all tensors to be on the same device, but {op} got {shapes}")


def _device_of(generator: torch.Generator) -> str:
    return NAME if generator._cdata in _generators else "cpu"


def _check_generator(generator: torch.Generator | None, device: str) -> None:
    found = device if generator is None else _device_of(generator)
    if found != device:
        raise MixedDevices(f"Expected a '{device}' device type for generator but found '{found}'")


def _kernel(op: torch._ops.OpOverload, lenient: bool) -> Callable[..., Any]:
    """Make the device's kernel of an operation: the CPU's, between checks."""
    schema = op._schema
    name = schema.name.removeprefix("aten::")
    random = any(argument.name == "generator" for argument in schema.arguments)
    takes_tensor = [str(argument.type) == "Tensor" for argument in schema.arguments]
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)

    def run(*args: Any, **kwargs: Any) -> Any:
        _check_devices(op, args, kwargs, lenient)
        if random:
            args, kwargs = _with_generator(op, args, kwargs)
        if name in WAITING:
            _wait(name)
        elif name in INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])):
            _wait("a mask as an index")
        lowered: list[tuple[torch.Tensor, torch.Tensor]] = []
        args = tuple(_lower(value, lowered) for value in args)
        kwargs = {key: _lower(value, lowered) for key, value in kwargs.items() if key != "pin_memory"}
        # A number that stands for a tensor, which the operation's other overload takes.
        number = any(isinstance(value, int | float) for value, it in zip(args, takes_tensor, strict=False) if it)
        result = (op.overloadpacket if number else op)(*args, **kwargs)
        for on_cpu, on_device in lowered:
            if on_cpu.shape != on_device.shape:
                on_device.data = relabel(on_cpu, NAME)
        return _raise(result, lowered, is_view)

    return run


def _with_generator(op: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Random numbers come from the device's generator where none is named."""
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    _check_generator(given.get("generator"), NAME)
    given["generator"] = given.get("generator") or _own
    positional = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    return (
        tuple(given[name] for name in positional if name in given),
        {name: value for name, value in given.items() if name not in positional},
    )


# What is not the CPU's kernel: copies, storages, and what torch leaves to such a device


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Between devices; a copy to the host that nobody waits for holds no values as yet."""
    lowered: list[tuple[torch.Tensor, torch.Tensor]] = []
    from_, to = _lower(source, lowered), _lower(target, lowered)
    if source.device == target.device:
        to.copy_(from_)
    elif target.device.type == NAME:
        pinned = getattr(source, "pinned", False)
        if not (non_blocking and pinned):
            _wait("a copy to the device")
        to.copy_(from_)
    elif non_blocking:
        copy = (to, from_.clone())
        to.fill_(math.nan if to.is_floating_point() else 113)
        _copies.append(copy)
    else:
        _wait("a copy to the host")
        to.copy_(from_)
    return target


def _of_storage(tensor: torch.Tensor, storage: torch.UntypedStorage, offset: int, size: Any, stride: Any) -> Any:
    """`Tensor.set_`: the tensor becomes one over a storage's memory."""
    if storage.nbytes() == 0:
        raw = torch.empty(0, dtype=tensor.dtype)
    else:
        memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        memory.owner = storage
        raw = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
    tensor.data = _as_strided(relabel(raw, NAME), size, stride, offset)
    return tensor


def _to_copy(
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    device = tensor.device if device is None else device
    made = torch.empty_like(tensor, dtype=dtype, device=device, memory_format=memory_format or torch.preserve_format)
    return made.copy_(tensor, non_blocking)


def _set_storage(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    return _of_storage(tensor, storage, 0, [storage.nbytes() // tensor.element_size()], [1])


def _set_part(tensor: torch.Tensor, storage: torch.UntypedStorage, offset: int, size: Any, stride: Any = ()) -> Any:
    return _of_storage(tensor, storage, offset, size, stride)


def _resize(tensor: torch.Tensor, size: Any, *, memory_format: torch.memory_format | None = None) -> torch.Tensor:
    if tuple(tensor.shape) != tuple(size):
        tensor.data = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    return tensor


def _convolution(*args: Any) -> torch.Tensor:
    return _kernel(torch.ops.aten.convolution.default, False)(*args)


def _convolution_backward(grad: Any, given: Any, weight: torch.Tensor, *args: Any) -> Any:
    *_, transposed, _, groups, _ = args
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return _kernel(torch.ops.aten.convolution_backward.default, False)(grad, given, weight, [channels], *args)


SPECIAL: dict[str, Callable[..., Any]] = {
    "_conj": torch.conj_physical,  # at once: memory that is shared does not say that it is to be conjugated
    "_copy_from": _copy,
    "_copy_from_and_resize": _copy,
    "_fused_sdp_choice": lambda *args, **kwargs: 0,  # attention from its formula
    "_to_copy": _to_copy,
    "as_strided": _as_strided,
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
    "resize_": _resize,
    "set_.source_Storage": _set_storage,
    "set_.source_Storage_storage_offset": _set_part,
}


def _low(tensors: list[torch.Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def _float32(tensors: list[torch.Tensor]) -> torch.dtype:
    return torch.float32


def _widest(tensors: list[torch.Tensor]) -> torch.dtype:
    return torch.float32 if any(tensor.dtype == torch.float32 for tensor in tensors) else _low(tensors)


def _autocast_kernel(
    op: torch._ops.OpOverload, choose: Callable[[list[torch.Tensor]], torch.dtype]
) -> Callable[..., Any]:
    """As autocast of CUDA: what is floating point and no float64 is cast to one dtype."""

    def cast(value: Any, to: torch.dtype) -> Any:
        if isinstance(value, list | tuple):
            return [cast(one, to) for one in value]
        return value.to(to) if isinstance(value, torch.Tensor) and _is_cast(value) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        to = choose([tensor for tensor in _tensors((*args, *kwargs.values())) if _is_cast(tensor)])
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return op(*(cast(value, to) for value in args), **{key: cast(value, to) for key, value in kwargs.items()})

    return run


def _is_cast(tensor: torch.Tensor) -> bool:
    return tensor.device.type == NAME and tensor.is_floating_point() and tensor.dtype != torch.float64


# What Python asks the device for, beside its kernels


class Generator(torch.Generator):
    """A generator of the CPU or of the device, which torch's own cannot be made for."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        generator = super().__new__(cls)
        if torch.device(device).type == NAME:
            _generators.add(generator._cdata)
            weakref.finalize(generator, _generators.discard, generator._cdata)
        return generator

    @property
    def device(self) -> torch.device:
        return torch.device(_device_of(self))


_own = Generator()  # what the device draws from where no generator is named


class Event:
    """A place in the device's queue, to wait for."""

    def __init__(self) -> None:
        self._last = _copies[-1] if _copies else None

    def synchronize(self) -> None:
        _arrive(sum(index + 1 for index, copy in enumerate(_copies) if copy is self._last))


class Stream:
    """The device's queue, which is the only one."""

    def record_event(self) -> Event:
        return Event()


def _synchronize(device: Any = None) -> None:
    _wait("synchronize")


def _device_module() -> types.ModuleType:
    """`torch.pretend`, as `torch.cuda`."""
    module = types.ModuleType(f"torch.{NAME}")
    zero = lambda *args, **kwargs: 0  # noqa: E731
    vars(module).update(
        _is_in_bad_fork=lambda: False,
        current_device=zero,
        device_count=lambda: 1,
        empty_cache=lambda: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        get_rng_state=lambda device=None: _own.get_state(),
        is_available=lambda: True,
        is_initialized=lambda: True,
        manual_seed=_own.manual_seed,
        manual_seed_all=_own.manual_seed,
        max_memory_allocated=zero,
        memory_allocated=zero,
        reset_peak_memory_stats=lambda device=None: None,
        set_device=lambda device: None,
        set_rng_state=lambda state, device=None: _own.set_state(state),
        synchronize=_synchronize,
    )
    return module


def _pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin 'torch.{NAME}' only dense CPU tensors can be pinned")
    pinned = tensor.clone()
    pinned.pinned = True
    return pinned


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor other data, also of another device, which torch allows for CUDA and not for this device."""
    if tensor.device == value.device:
        torch._C.TensorBase.data.__set__(tensor, value)  # type: ignore[attr-defined]
    elif isinstance(tensor, torch.nn.Parameter):
        torch.utils.swap_tensors(tensor, torch.nn.Parameter(value.detach(), requires_grad=tensor.requires_grad))
    else:
        torch.utils.swap_tensors(tensor, value.detach())


_clone = torch.UntypedStorage.clone


def _clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    if storage.device.type != NAME:
        return _clone(storage)
    return torch.empty(0, dtype=torch.uint8, device=NAME).set_(storage).clone().untyped_storage()


def _takes_data_of(input: torch.Tensor, from_: torch.Tensor) -> bool:
    return True


_takes_data_of.__annotations__ = {"input": torch.Tensor, "from_": torch.Tensor, "return": bool}  # dynamo compares them


def _checked(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that makes random numbers, refusing the generator of another device."""

    def run(*args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> torch.Tensor:
        made = make(*args, generator=generator, **kwargs)
        _check_generator(generator, made.device.type)
        return made

    return run


def install() -> None:
    """Make the device of this process: `torch.device("pretend")`."""
    lenient = _lenient_operations()
    _generators.add(_own._cdata)
    torch.Tensor.data = property(torch._C.TensorBase.data.__get__, _set_data)  # type: ignore[assignment, attr-defined]
    torch._has_compatible_shallow_copy_type = _takes_data_of  # so that moved parameters stay the same objects
    _setup_privateuseone_for_python_backend(NAME, backend_module=_device_module())
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        if space != "aten" or name in SPECIAL or not torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU"):
            continue
        library.impl(name, _kernel(_operation(name), name in lenient), KEY)
    for name, kernel in SPECIAL.items():
        library.impl(name, kernel, KEY)
    for names, choose in ((AUTOCAST_LOW, _low), (AUTOCAST_FLOAT32, _float32), (AUTOCAST_WIDEST, _widest)):
        for name in names:
            library.impl(name, _autocast_kernel(_operation(name), choose), "AutocastPrivateUse1")
    everything = torch.library.Library("_", "IMPL")
    _libraries.append(everything)
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    torch.UntypedStorage.clone = _clone_storage  # type: ignore[method-assign]
    torch.Generator = Generator  # type: ignore[misc]
    torch.Tensor.pin_memory = _pin  # type: ignore[method-assign]
    torch.Tensor.is_pinned = lambda tensor, device=None: getattr(tensor, "pinned", False)  # type: ignore[method-assign]
    torch.accelerator.synchronize = _synchronize
    torch.accelerator.current_stream = lambda device=None: Stream()
    for name in ("rand", "randint", "randn", "randperm"):
        setattr(torch, name, _checked(getattr(torch, name)))


def _operation(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def let_accelerate_scale_losses() -> None:
    """Let accelerate take fp16 here: it has a list of the devices that it knows."""
    initialise = Accelerator.__init__

    def run(accelerator: Accelerator, *args: Any, mixed_precision: str | None = None, **kwargs: Any) -> None:
        is_fp16 = mixed_precision == "fp16"
        initialise(accelerator, *args, mixed_precision="no" if is_fp16 else mixed_precision, **kwargs)
        if is_fp16:
            accelerator.state._mixed_precision = "fp16"
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler(NAME)

    Accelerator.__init__ = run


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Give what the host waits for in the block, by place."""
    before = Counter(waits)
    found: Counter[str] = Counter()
    yield found
    found.update(waits - before)
