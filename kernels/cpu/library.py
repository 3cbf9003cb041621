"""The shared library of kernels/cpu/csrc: found, loaded, called with tensors. Plain pointers; no header of PyTorch."""

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from covo_npu.kernels.errors import BackendError
from covo_npu.kernels.interface import SNAKE_CONTEXT

FILE = Path(__file__).with_name("libcovo.so")
LIMIT = "COVO_MAX_CPU_ISA"  # environment: the best instruction set that may serve, as ONEDNN_MAX_CPU_ISA is for oneDNN
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}  # the enum of covo.h
HEAD_DIMS = 32  # attention takes heads of a multiple of that
WINOGRAD_POINTS, MOST_DILATION = 7, 16  # POINTS and MOST_DILATION of covo.h

Pointer, Long = ctypes.c_void_p, ctypes.c_long


class _Attend(ctypes.Structure):
    """The struct Attend of covo.h."""

    _fields_ = [(name, Pointer) for name in ("q", "k", "v", "out")]
    _fields_ += [(name, Long) for name in ("B", "S", "K", "H", "D")]
    _fields_ += [(f"{name}_{apart}", Long) for name in "qkv" for apart in ("batch", "row", "head")]
    _fields_ += [("scale", ctypes.c_float)]


class _Snake(ctypes.Structure):
    """The struct Snake of covo.h."""

    _fields_ = [(name, Pointer) for name in ("x", "alpha", "inverse_beta", "up", "down", "y")]
    _fields_ += [(name, Long) for name in ("rows", "C", "N")] + [(name, ctypes.c_int) for name in ("starts", "ends")]


class _Winograd(ctypes.Structure):
    """The struct Winograd of covo.h."""

    _fields_ = [(name, Pointer) for name in ("signal", "products", "bias")]
    _fields_ += [(name, Long) for name in ("B", "C", "N", "tiles", "dilation")]


class _Norm(ctypes.Structure):
    """The struct Norm of covo.h."""

    _fields_ = [(name, Pointer) for name in ("x", "residual", "weight", "normed", "summed")]
    _fields_ += [("rows", Long), ("C", Long), ("eps", ctypes.c_float), ("type", ctypes.c_int)]


class _Rotary(ctypes.Structure):
    """The struct Rotary of covo.h."""

    _fields_ = [(name, Pointer) for name in ("x", "cosines", "sines", "y")]
    _fields_ += [(name, Long) for name in ("B", "S", "H", "D")]
    _fields_ += [(name, Long) for name in ("x_batch", "x_row", "x_head", "angle_batch")]
    _fields_ += [("type", ctypes.c_int)]


class _Gate(ctypes.Structure):
    """The struct Gate of covo.h."""

    _fields_ = [("gate_up", Pointer), ("y", Pointer), ("rows", Long), ("F", Long), ("type", ctypes.c_int)]


class ProductWeights(ctypes.Structure):
    """The struct ProductWeights of covo.h."""

    _fields_ = [("weight", Pointer), ("bias", Pointer), ("scale", Pointer), ("type", Long)]


class Layer(ctypes.Structure):
    """The struct Layer of covo.h."""

    _fields_ = [("norm", Pointer), ("post_norm", Pointer)]
    _fields_ += [(name, ProductWeights) for name in ("qkv", "o", "gate_up", "down")]
    _fields_ += [("keys", Pointer), ("values", Pointer)]


class Decoder(ctypes.Structure):
    """The struct Decoder of covo.h."""

    _fields_ = [("layers", ctypes.POINTER(Layer)), ("x", Pointer), ("cosines", Pointer), ("sines", Pointer)]
    _fields_ += [("lengths", ctypes.POINTER(Long)), ("out", Pointer), ("residual", Pointer)]
    _fields_ += [(name, Long) for name in ("num_layers", "B", "C", "H", "G", "D", "F", "K_max")]
    _fields_ += [("eps", ctypes.c_float), ("scale", ctypes.c_float), ("type", ctypes.c_int)]


# Functions of a set's number, a number of threads and one of these.
JOBS = {
    "attention": _Attend, "snake": _Snake, "winograd_signal": _Winograd, "winograd_results": _Winograd,
    "norm": _Norm, "rotary": _Rotary, "gate": _Gate, "decoder": Decoder,
}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded library; it works with PyTorch's own OpenMP threads where they are of a known kind.

    Raises BackendError that says why there is none.
    """
    if not FILE.exists():
        raise BackendError(
            f"the kernels for CPUs are not there: no {FILE.name} beside {Path(__file__).name}, so no C compiler was "
            "found when covo-npu was installed; install gcc or clang, then covo-npu again"
        )
    try:
        loaded = ctypes.CDLL(str(FILE))
    except OSError as error:
        raise BackendError(f"the kernels for CPUs cannot be loaded: {error}; install covo-npu again") from error
    loaded.covo_set_name.restype = loaded.covo_sources.restype = ctypes.c_char_p
    loaded.covo_use_team.argtypes = [Pointer]
    loaded.covo_linear.argtypes = [
        ctypes.c_int, ctypes.c_int, Pointer, ctypes.c_int, Pointer, ctypes.c_int, Pointer, Pointer, Pointer,
        Long, Long, Long,
    ]  # fmt: skip
    loaded.covo_decode_attention.argtypes = [
        ctypes.c_int, ctypes.c_int, Pointer, Pointer, Pointer, ctypes.POINTER(Long), Pointer, ctypes.c_int,
        Long, Long, Long, Long, Long, ctypes.c_float,
    ]  # fmt: skip
    for name, job in JOBS.items():
        getattr(loaded, f"covo_{name}").argtypes = [ctypes.c_int, ctypes.c_int, ctypes.POINTER(job)]
    loaded.covo_use_team(_openmp_team())
    return loaded


def missing() -> str | None:
    """Return why the library cannot be used, or None if it can."""
    try:
        library()
    except BackendError as error:
        return str(error)
    return None


def _openmp_team() -> int | None:
    """Return the address of GOMP_parallel in the process, None if PyTorch brought no OpenMP that has it."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, Pointer).value


def known_sets() -> tuple[str, ...]:
    """Return the instruction sets that the library was built for, best first."""
    return tuple(_name(i) for i in range(_count()))


def usable_sets() -> tuple[str, ...]:
    """Return those of them that this machine executes, best first; not those above COVO_MAX_CPU_ISA.

    Raises BackendError if that is set to a name that the library does not know.
    """
    names, limit = known_sets(), os.environ.get(LIMIT)
    if limit is not None and limit not in names:
        raise BackendError(f"{LIMIT}={limit}: unknown instruction set; there are {', '.join(names)}")
    first = 0 if limit is None else names.index(limit)
    return tuple(name for i, name in enumerate(names) if i >= first and library().covo_set_here(i))


def _count() -> int:
    count = 0
    while library().covo_set_name(count):
        count += 1
    return count


def _name(i: int) -> str:
    name: bytes = library().covo_set_name(i)
    return name.decode()


@functools.cache
def _numbers() -> dict[str, int]:
    return {name: i for i, name in enumerate(known_sets())}


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Return whether linear() takes these tensors: weights of 16 or 8 bits, rows of any of its types, on the CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and (weight.dtype == torch.int8 or (weight.dtype == x.dtype and weight.element_size() == 2))
    )


def linear(best: str, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return (x @ weight.T) * scale + bias in x's dtype: [..., N]. Sums in float32, rounded once.

    x: [..., K]; weight: [N, K] bfloat16, float16 or int8, read where it lies; scale: [N] float32; bias: [N] in x.dtype.
    best: the instruction set; types that it lacks are served by the next one. Runs in torch.get_num_threads() threads.
    """
    return served_linear(best, x, weight, scale, bias)[0]


def served_linear(
    best: str, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, str]:
    """Return linear(), and the name of the instruction set that served."""
    size_out, size_in = weight.shape
    if x.shape[-1] != size_in:
        raise ValueError(f"x has rows of {x.shape[-1]}, the weights of {size_in}")
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    scale = None if scale is None else scale.float().contiguous()
    y = torch.empty(*x.shape[:-1], size_out, dtype=x.dtype)
    served = library().covo_linear(
        _numbers()[best], torch.get_num_threads(), x.data_ptr(), TYPES[x.dtype], weight.data_ptr(),
        TYPES[weight.dtype], _address(scale), _address(bias), y.data_ptr(), x.numel() // size_in if size_in else
        y.numel() // max(size_out, 1), size_out, size_in,
    )  # fmt: skip
    return y, _name(_checked(served))


def require_contiguous(*caches: Tensor) -> None:
    """Raise ValueError for a cache that does not lie as its shape says: the library reads and writes it in place."""
    if not all(cache.is_contiguous() for cache in caches):
        raise ValueError(f"a cache must be contiguous, found strides {[cache.stride() for cache in caches]}")


def valid_rows(lengths: Sequence[int], max_length: int) -> ctypes.Array[ctypes.c_long]:
    """Return lengths as the library takes them. Raises ValueError for one that is not 1 to max_length."""
    if not all(0 < length <= max_length for length in lengths):
        raise ValueError(f"lengths must be 1 to {max_length}, found {list(lengths)}")
    return (Long * len(lengths))(*lengths)


def decode_attention(
    best: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float
) -> Tensor:
    """Return Kernels.decode_attention for heads of a multiple of 32: scores, weights and sums in float32."""
    num_slots, num_heads, head_dim = q.shape
    _, num_kv_heads, max_length, _ = k_cache.shape
    require_contiguous(k_cache, v_cache)
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype)
    served = library().covo_decode_attention(
        _numbers()[best], torch.get_num_threads(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        valid_rows(lengths, max_length), out.data_ptr(), TYPES[q.dtype],
        num_slots, num_heads, num_kv_heads, max_length, head_dim, scale,
    )  # fmt: skip
    _checked(served)
    return out


def attends(best: str, q: Tensor, k: Tensor) -> bool:
    """Return whether attention() takes these tensors: bfloat16 on an x86-64 that multiplies it, heads that fit."""
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and q.shape[-1] % HEAD_DIMS == 0
        and k.shape[1] > 0
        and bool(library().covo_attends(_numbers()[best]))
    )


def attention(best: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return Kernels.attention for bfloat16 and heads of a multiple of 32: scores, softmax and sums in float32, weights
    rounded to bfloat16. q, k, v: [B, S or K, H, D], rows of D contiguous; K and scale are larger than 0.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    sizes = (q.shape[0], q.shape[1], *k.shape[1:])
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    job = _Attend(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *sizes, *strides, scale)
    _checked(_run("attention", best, job))
    return out


def anti_aliased_snake(
    best: str,
    x: Tensor,
    alpha: Tensor,
    inverse_beta: Tensor,
    up: tuple[float, ...],
    down: tuple[float, ...],
    starts: bool,
    ends: bool,
) -> Tensor:
    """Return Kernels.anti_aliased_snake for float32: a channel at a time, in pieces that stay in the first cache."""
    x, alpha, inverse_beta = x.contiguous(), alpha.float().contiguous(), inverse_beta.float().contiguous()
    slots, channels, length = x.shape
    y = x.new_empty(slots, channels, max(length - SNAKE_CONTEXT * ((not starts) + (not ends)), 0))
    taps = [(ctypes.c_float * 12)(*filter_) for filter_ in (up, down)]
    pointers = [x.data_ptr(), alpha.data_ptr(), inverse_beta.data_ptr(), *map(ctypes.addressof, taps), y.data_ptr()]
    job = _Snake(*pointers, slots * channels, channels, length, starts, ends)
    _run("snake", best, job)
    return y


def winograd_signal(best: str, x: Tensor, tiles: int, dilation: int) -> Tensor:
    """Return the transformed signal [B, WINOGRAD_POINTS, C, tiles], float32. x: [B, C, N]; after it zeros follow.

    tiles is a multiple of dilation, which is at most MOST_DILATION; see csrc/winograd.h.
    """
    x, (slots, channels, length) = x.contiguous(), x.shape
    products = x.new_empty(slots, WINOGRAD_POINTS, channels, tiles)
    job = _Winograd(x.data_ptr(), products.data_ptr(), None, slots, channels, length, tiles, dilation)
    _run("winograd_signal", best, job)
    return products


def winograd_results(best: str, products: Tensor, bias: Tensor | None, length: int, dilation: int) -> Tensor:
    """Return [B, C, length], at most 4 * tiles long, plus the bias [C]. products: [B, WINOGRAD_POINTS, C, tiles]."""
    slots, _, channels, tiles = products.shape
    products, bias = products.contiguous(), None if bias is None else bias.float().contiguous()
    y = products.new_empty(slots, channels, length)
    job = _Winograd(y.data_ptr(), products.data_ptr(), _address(bias), *y.shape, tiles, dilation)
    _run("winograd_results", best, job)
    return y


def rms_norm(best: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return Kernels.add_rms_norm; without a residual, Kernels.rms_norm and x. All are of one type."""
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    normed = torch.empty_like(x)
    summed = x if residual is None else torch.empty_like(x)
    residual = None if residual is None else residual.contiguous()
    pointers = (x.data_ptr(), _address(residual), weight.data_ptr(), normed.data_ptr(), summed.data_ptr())
    size = x.shape[-1]
    job = _Norm(*pointers, x.numel() // max(size, 1), size, eps, TYPES[x.dtype])
    _run("norm", best, job)
    return normed, summed


def rotary(best: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return Kernels.rotary, rounded once. All are of one type."""
    x, cos, sin = x if x.stride(-1) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    angle_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    pointers = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr())
    job = _Rotary(*pointers, *x.shape, *x.stride()[:3], angle_batch, TYPES[x.dtype])
    _run("rotary", best, job)
    return y


def swiglu(best: str, gate_up: Tensor) -> Tensor:
    """Return Kernels.swiglu, rounded once."""
    gate_up, size = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype)
    job = _Gate(gate_up.data_ptr(), y.data_ptr(), y.numel() // max(size, 1), size, TYPES[y.dtype])
    _run("gate", best, job)
    return y


def decoder(best: str, job: Decoder) -> None:
    """Compute all layers of a decode step, see covo.h; the job names the memory that is read and written."""
    _checked(_run("decoder", best, job))


def _run(name: str, best: str, job: ctypes.Structure) -> int:
    """Call one of JOBS with PyTorch's threads; return what it does, if anything."""
    returned: int = getattr(library(), f"covo_{name}")(_numbers()[best], torch.get_num_threads(), ctypes.byref(job))
    return returned


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _checked(served: int) -> int:
    if served < 0:
        raise MemoryError("no memory for the buffers of a product")
    return served
