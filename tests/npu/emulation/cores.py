"""Which operators an Ascend NPU computes on its AICPU instead of its AI cores: right, slow, and doubtful in a capture.

One row an operator: the dtypes of the argument that decides, as the op_api sources of branch 8.5.0 list them for 910B
and 910_93 (AICORE_DTYPE_SUPPORT_LIST and the like in hicann/ops-nn and hicann/ops-math; the file stands beside it).
An operator without a row is not known to have a way over the AICPU for the dtypes that we use.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from emulation.limits import Call, by_operator

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
I8, I16, I32, I64, U8, BOOL = torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool
FLOATS = (F16, F32, BF16)
NUMBERS = (*FLOATS, I8, I32, I64, U8)
MAX_SCATTERED = 2_097_152  # elements that scatter takes on an AI core


@dataclass(frozen=True)
class Cores:
    """operators: a pattern of whole names without overload; argument: whose dtype decides."""

    operators: str
    argument: str
    dtypes: tuple[torch.dtype, ...]
    source: str
    also: Callable[[Call], bool] = lambda call: True  # what else an AI core wants


CORES = (
    Cores("aten::scatter_?", "self", (*FLOATS, I32, I8, U8), "scatter_elements.cpp",
          lambda call: call.self.numel() <= MAX_SCATTERED),
    Cores("aten::gather", "self", (*NUMBERS, I16), "gather_elements.cpp"),
    Cores("aten::(index_select|embedding)", "self|weight", (*NUMBERS, I16, BOOL), "gather_v2.cpp"),
    Cores("npu::npu_scatter_nd_update_", "self|input", (*FLOATS, BOOL, I64, I8, I32, I16), "scatter_nd_update.cpp"),
    Cores("aten::masked_fill_?", "self", (*FLOATS, BOOL, I8, I32), "masked_fill.cpp"),
    Cores("aten::fill_", "self", (*FLOATS, I32, I64, I8, BOOL), "fill.cpp"),
    Cores("aten::cumsum", "self", (*FLOATS, I32), "cumsum.cpp"),
    Cores("aten::argmax", "self", (*FLOATS, I32, I64), "argmax_v2.cpp"),
    Cores("aten::topk", "self", FLOATS, "topk.cpp"),
    Cores("aten::(le|ge|lt|gt)", "self", NUMBERS, "less_equal.cpp"),
    Cores("aten::(eq|ne)", "self", (*NUMBERS, BOOL), "equal.cpp"),
    Cores("aten::where", "self", NUMBERS, "select.cpp"),
    Cores("aten::(add|sub|mul)_?", "self", (*NUMBERS, BOOL, torch.complex64), "add.cpp, mul.cpp"),
    Cores("aten::clamp.*", "self", (*FLOATS, I32, I64), "clip_by_value.cpp"),
    Cores("aten::floor_divide_?", "self", (*FLOATS, I32, I8, U8), "floordiv.cpp"),
    Cores("aten::(sin|cos|log)_?", "self", FLOATS, "sin.cpp, log.cpp"),
    Cores("aten::(copy_|clone)", "self", (*NUMBERS, I16, BOOL), "view_copy.cpp"),
)  # fmt: skip


cores_of = by_operator(CORES)


def on_aicpu(call: Call) -> Iterator[str]:
    """Yield the operator and the dtype of a call that the AI cores do not compute."""
    for row in cores_of(call):
        x = next((call.arguments[part] for part in row.argument.split("|") if part in call.arguments), None)
        if isinstance(x, torch.Tensor) and (x.dtype not in row.dtypes or not row.also(call)):
            yield f"{call.packet} {str(x.dtype).removeprefix('torch.')}"
