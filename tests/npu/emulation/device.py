"""The emulated device: the genuine torch_npu's "npu:0" with CPU arithmetic and the documented limits.

install() overrides each operator for which torch_npu has a kernel by one that checks the rules (rules.py), writes the
launch into the log, and computes on CPU views of the same memory (operators.py where the device's semantics differ from
the CPU's). An operator that torch_npu lacks is not overridden: torch_npu would fall back to the CPU without a word, and
TORCH_NPU_FALLBACK_CPU_DISABLE=1 turns that into an error. The set of operators is therefore the library's own.

What this shows: names, arguments, dtypes, layouts, documented limits, launches, synchronisations, what a captured graph
may hold. What it cannot show: the numerics, the undocumented limits and the speed of hardware.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch_npu
from emulation import cores, operators, profiler, rules, signatures, traffic
from emulation.graphs import Graph
from emulation.limits import Call, bind, leaves
from torch import Tensor
from torch._C import _dispatch_get_all_op_names, _dispatch_has_kernel_for_dispatch_key

# Operators that only make or describe tensors: torch_npu's own kernels serve, and nothing is launched.
METADATA = (
    "aten::empty", "aten::new_empty", "aten::resize", "aten::set_", "aten::is_set_to", "aten::record_stream",
    "aten::is_pinned", "aten::_pin_memory",
)  # fmt: skip


@dataclass
class Log:
    """What the host asked of the device, in order. Copies that the emulation itself makes are not in it."""

    launches: list[tuple[str, torch.dtype]] = field(default_factory=list)  # (operator, dtype of its first tensor)
    replayed: list[str] = field(default_factory=list)  # operators that graphs ran
    on_aicpu: list[str] = field(default_factory=list)  # operators and dtypes that no AI core computes
    moved_bytes: int = 0  # to and from the device's memory, see traffic.py
    executors: list[Hashable] = field(default_factory=list)  # what torch_npu looks up a prepared operator by
    synchronisations: list[str] = field(default_factory=list)  # why the host had to wait
    copies: list[str] = field(default_factory=list)  # host to device and back

    @contextmanager
    def recording(self) -> Iterator["Log"]:
        """Yield a log of what happens inside the block."""
        global log
        outer, log = log, Log()
        try:
            yield log
        finally:
            for name in (entry.name for entry in fields(Log)):
                setattr(outer, name, getattr(outer, name) + getattr(log, name))
            log = outer


log = Log()


def on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "npu"


def mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """Return an argument or a result with function(x) for all that its lists and tuples hold."""
    if isinstance(x, list | tuple):
        return (tuple if isinstance(x, tuple) else list)(mapped(function, y) for y in x)
    return function(x)


def host_view(x: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of a device tensor."""
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(x.shape, dtype=x.dtype)
    memory = (ctypes.c_char * (storage.nbytes() // x.element_size() * x.element_size())).from_address(
        storage.data_ptr()
    )
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.size(), x.stride(), x.storage_offset())


def to_device(y: Tensor, device: torch.device | str = "npu") -> Tensor:
    """Return a device tensor like a CPU tensor, strides too. Not a launch: the device would write there."""
    out = torch.empty_strided(y.size(), y.stride(), dtype=y.dtype, device=device)
    host_view(out).copy_(y)
    return out


def executor(name: str, call: Call) -> Hashable:
    """Return what a prepared operator is found again by: all arguments, of tensors also where in their memory they lie.

    Source: add_param_to_buf of op_plugin/utils/op_api_common.h, Ascend/op-plugin 7.3.0.
    """

    def key(x: Any) -> Hashable:
        if isinstance(x, Tensor):
            memory = x.untyped_storage().nbytes() // x.element_size()
            return x.dtype, tuple(x.shape), x.stride(), x.storage_offset(), memory
        return tuple(x) if isinstance(x, list) else x

    return name, *map(key, call.arguments.values())


def emulated(name: str, schema: torch.FunctionSchema, arithmetic: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel of one operator: check, log, compute on the host's views."""

    made_by_caller = [a.name for a in schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        call = Call(name, bind(schema, args, kwargs))
        rules.check(call)
        tensors = call.tensors
        place = next((x.device for x in tensors if on_device(x)), "npu")
        waits = list(rules.synchronises(call))
        graph = Graph.capturing(next(iter(waits), None))
        if graph:
            pass  # it is noted when it is replayed
        elif name == "aten::_local_scalar_dense":  # a read-back, not a kernel
            log.copies.append("device to host")
        else:
            log.launches.append((name, tensors[0].dtype if tensors else torch.get_default_dtype()))
        log.executors.append(executor(name, call))
        log.on_aicpu.extend(cores.on_aicpu(call))
        log.synchronisations.extend(waits)

        def computed(view_of: Callable[[Tensor], Tensor]) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
            """Return the result on the host, and {id of a view: (the view, its device tensor)}."""
            originals: dict[int, tuple[Tensor, Tensor]] = {}

            def to_host(x: Any) -> Any:
                if on_device(x):
                    view = view_of(x)
                    originals[id(view)] = (view, x)
                    return view
                return torch.device("cpu") if isinstance(x, torch.device) else x

            named = {key: mapped(to_host, x) for key, x in kwargs.items()}
            return arithmetic(*mapped(to_host, args), **named), originals

        result, originals = computed((lambda x: host_view(x).clone()) if graph else host_view)

        def back(y: Any) -> Any:
            if not isinstance(y, Tensor):
                return y
            return originals[id(y)][1] if id(y) in originals else to_device(y, place)

        placed = mapped(back, result)
        log.moved_bytes += traffic.moved_bytes(call, [y for y in leaves(placed) if isinstance(y, Tensor)])
        if graph:
            written = [
                (number, y)
                for number, (y, x) in enumerate(zip(leaves(placed), leaves(result), strict=True))
                if isinstance(y, Tensor) and id(x) not in originals
            ]
            for y in (*(y for _, y in written), *(kwargs[key] for key in made_by_caller if key in kwargs)):
                host_view(y).fill_(float("nan") if y.is_floating_point() else 0)

            def again() -> None:
                computed_again = leaves(computed(host_view)[0])
                for number, y in written:
                    host_view(y).copy_(computed_again[number])

            graph.add(name, again)
        return placed

    return kernel


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy in any direction; host and device share memory here. Between device tensors it is a launch."""
    call = Call("aten::copy_", {"self": target, "src": source, "non_blocking": non_blocking})
    rules.check(call)
    inside = on_device(target) and on_device(source)
    waits = [] if inside or source.numel() == 0 else list(rules.synchronises(call))
    graph = Graph.capturing(next(iter(waits), None))

    def copy() -> None:
        host = [host_view(x) if on_device(x) else x for x in (target, source)]
        host[0].copy_(host[1])

    if graph:
        if source.numel():
            log.on_aicpu.extend(cores.on_aicpu(call))
            graph.add("aten::copy_", copy)
        return target
    if source.numel() and inside:
        log.launches.append(("aten::copy_", target.dtype))
        log.executors.append(executor("aten::copy_", call))
        log.moved_bytes += traffic.moved_bytes(call, [target])
        log.on_aicpu.extend(cores.on_aicpu(call))
    elif source.numel():
        log.copies.append("host to device" if on_device(target) else "device to host")
        log.synchronisations.extend(waits)
    copy()
    return target


def to_copy(
    source: Tensor, *, dtype: torch.dtype | None = None, layout: Any = None, device: torch.device | None = None,
    pin_memory: bool | None = None, non_blocking: bool = False, memory_format: Any = None,
) -> Tensor:  # fmt: skip
    """Return a copy in another dtype or on another device: what .to(), .float() and .cpu() become."""
    place = device or source.device
    options = {"memory_format": memory_format} if memory_format else {}
    pinned = non_blocking and place.type == "cpu"  # as PyTorch does for every accelerator
    target = torch.empty_like(source, dtype=dtype, device=place, pin_memory=pinned, **options)
    return target.copy_(source, non_blocking)


def operator(name: str) -> torch._ops.OpOverload | None:
    """Return the overload "namespace::packet.overload", or None if Python cannot reach it."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except AttributeError:
        return None


def returns_view(op: torch._ops.OpOverload) -> bool:
    return any(value.alias_info and not value.alias_info.is_write for value in op._schema.returns)


def counted(synchronize: Callable[..., Any]) -> Callable[..., Any]:
    """Return synchronize(), which notes in the log that the host waits."""

    @functools.wraps(synchronize)
    def noted(*args: Any, **kwargs: Any) -> Any:
        Graph.capturing("synchronize")
        log.synchronisations.append("synchronize")
        return synchronize(*args, **kwargs)

    return noted


def install() -> tuple[torch.library.Library, torch.library.Library]:
    """Override the operators and return the two libraries that hold the overrides; they last as long as these live."""
    torch.npu.set_device(0)
    warnings.filterwarnings("ignore", message=".*verriding a previously registered kernel.*")
    aten, npu = torch.library.Library("aten", "IMPL"), torch.library.Library("npu", "IMPL")
    special = {"aten::copy_": copy_, "aten::_to_copy": to_copy}
    for name in _dispatch_get_all_op_names():
        if name.startswith(METADATA) or not _dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"):
            continue
        op = operator(name)
        if op is None or returns_view(op):
            continue
        arithmetic = operators.ARITHMETIC.get(name)
        if name.startswith("npu::"):
            if arithmetic is not None:
                npu.impl(name[5:], emulated(name, op._schema, arithmetic), "PrivateUse1")
        elif name.startswith("aten::"):
            aten.impl(name[6:], special.get(name) or emulated(name, op._schema, arithmetic or op), "PrivateUse1")
    for owner in (torch_npu.npu, torch_npu.npu.Stream, torch_npu.npu.Event):
        owner.synchronize = counted(owner.synchronize)
    torch_npu.npu.NPUGraph = Graph
    torch_npu.profiler = profiler
    signatures.guard(torch_npu)
    torch_npu.emulation = lambda: log  # what the tests look for
    return aten, npu
