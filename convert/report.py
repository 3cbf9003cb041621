"""What a conversion will do or did, for people and for programs."""

from collections import Counter
from typing import Any

from covo_npu.convert import rules
from covo_npu.convert.plan import Plan, Step
from covo_npu.convert.source import Source
from covo_npu.convert.write import FILES


def plan_report(plan: Plan, source: Source) -> dict[str, Any]:
    """Return the plan as a JSON object: files, operations, what is left out, totals."""
    used = {tensor.name: tensor for step in plan.steps for tensor in step.sources if tensor is not None}
    return {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "tensors_in": len(used),
        "bytes_in": sum(tensor.bytes for tensor in used.values()),
        "tensors_out": len(plan.steps),
        "bytes_out": plan.bytes,
        "files": {
            FILES[stem]: {"tensors": len(steps), "bytes": sum(step.bytes for step in steps)}
            for stem, steps in plan.files().items()
        },
        "operations": dict(Counter(_operation(step) for step in plan.steps)),
        "left_out": {
            prefix: {"tensors": group.tensors, "bytes": group.bytes, "reason": group.reason}
            for prefix, group in plan.left_out.items()
        },
        "warnings": list(source.warnings),
    }


def plan_text(report: dict[str, Any]) -> str:
    """Return the plan for people."""
    rows = [f"plan: {report['src']} -> {report['dst']}, {_totals(report)}"]
    rows += [f"  {name}: {row['tensors']} tensors, {_size(row['bytes'])}" for name, row in report["files"].items()]
    rows += ["  " + ", ".join(f"{count} {name}" for name, count in sorted(report["operations"].items()))]
    return "\n".join([*rows, *_left_out(report), "nothing was written (--dry-run)"])


def summary_text(report: dict[str, Any]) -> str:
    """Return the closing summary for people."""
    rate = report["bytes_written"] / report["seconds"] / 1e9
    done = f"{report['dst']}: {_totals(report)}; {report['seconds']:.1f} s, {rate:.2f} GB/s"
    return "\n".join([done, *_left_out(report)])


def _operation(step: Step) -> str:
    """Return the word of the plan for a step."""
    if step.operation == rules.ROWS:
        cast = any(tensor is not None and tensor.dtype != step.torch_dtype for tensor in step.sources)
        return ("fused" if len(step.needs) > 1 else "copied") + (" and cast" if cast else "")
    return _WORDS.get(step.operation, "computed")


_WORDS = {rules.FLAT: "copied", rules.FOLD: "folded", rules.MEAN: "copied", rules.EQUAL: "merged"}


def _totals(report: dict[str, Any]) -> str:
    tensors = f"{report['tensors_in']} tensors in ({_size(report['bytes_in'])})"
    return f"{tensors}, {report['tensors_out']} out ({_size(report['bytes_out'])}), {report['dtype']}"


def _left_out(report: dict[str, Any]) -> list[str]:
    return [
        f"  left out: {prefix}.* {group['tensors']} tensors, {_size(group['bytes'])} ({group['reason']})"
        for prefix, group in report["left_out"].items()
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
