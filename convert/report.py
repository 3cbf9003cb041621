"""What a conversion will do or did, for people and for programs."""

from collections import Counter
from typing import Any

from covo_npu.convert import rules
from covo_npu.convert.plan import Plan, Step
from covo_npu.convert.source import SourceCheckpoint
from covo_npu.runtime.checkpoint.format import PREFIX

ZEROS = "zeros"  # in the place of a source's name


def plan_report(plan: Plan, source: SourceCheckpoint) -> dict[str, Any]:
    """Return the plan as a JSON object: files, operations, what is left out, totals."""
    used = {tensor.name: tensor for step in plan.steps for tensor in step.sources if tensor is not None}
    return {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "weights": plan.weights,
        "tensors_in": len(used),
        "bytes_in": sum(tensor.bytes for tensor in used.values()),
        "tensors_out": len(plan.steps),
        "bytes_out": plan.bytes,
        "files": {
            name: {"tensors": len(steps), "bytes": sum(step.bytes for step in steps)}
            for name, steps in plan.files().items()
        },
        "operations": dict(Counter(_operation(step) for step in plan.steps)),
        "left_out": {
            prefix: {"tensors": group.tensors, "bytes": group.bytes, "reason": group.reason}
            for prefix, group in plan.left_out.items()
        },
        "warnings": list(source.warnings),
    }


def tensor_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return every target tensor in the order of the files."""
    steps = [step for steps in plan.files().values() for step in steps]
    return [
        {
            "target": step.recipe.target,
            "sources": [need.name or ZEROS for need in step.recipe.needs],
            "operation": step.recipe.operation.name,
            "split": step.recipe.split.name,
            "shape": list(step.shape),
            "dtype": step.dtype,
            "file": step.file,
        }
        for step in steps
    ]


def tensor_line(row: dict[str, Any]) -> str:
    """Return a target tensor on one line, to be searched by any of its names."""
    sources = " + ".join(row["sources"]) or "nothing"
    return f"{row['target']} <- {sources}: {row['operation']} {row['shape']} {row['dtype']} in {row['file']}"


def plan_text(report: dict[str, Any]) -> str:
    """Return the plan for people: with "tensors" in the report, every tensor first."""
    rows = [tensor_line(row) for row in report.get("tensors", [])]
    rows += [f"plan: {report['src']} -> {report['dst']}, {_totals(report)}"]
    rows += [f"  {name}: {row['tensors']} tensors, {_size(row['bytes'])}" for name, row in report["files"].items()]
    rows += [f"  {PREFIX}: the rows of the system prompt"] if report["prefix"] else []
    rows += ["  " + ", ".join(f"{count} {name}" for name, count in sorted(report["operations"].items()))]
    return "\n".join([*rows, *_left_out(report), "nothing was written (--dry-run)"])


def summary_text(report: dict[str, Any]) -> str:
    """Return the closing summary for people."""
    rate = report["bytes_written"] / report["seconds"] / 1e9
    done = f"{report['dst']}: {_totals(report)}; {report['seconds']:.1f} s, {rate:.2f} GB/s"
    return "\n".join([done, *_left_out(report)])


def _operation(step: Step) -> str:
    """Return the word of the plan for a step."""
    operation = step.recipe.operation
    if operation is not rules.ROWS:
        return operation.done
    cast = any(tensor is not None and tensor.dtype != step.dtype for tensor in step.sources)
    return ("fused" if len(step.sources) > 1 else operation.done) + (" and cast" if cast else "")


def _totals(report: dict[str, Any]) -> str:
    tensors = f"{report['tensors_in']} tensors in ({_size(report['bytes_in'])})"
    products = "" if report["weights"] == report["dtype"] else f", products of the LLM in {report['weights']}"
    return f"{tensors}, {report['tensors_out']} out ({_size(report['bytes_out'])}), {report['dtype']}{products}"


def _left_out(report: dict[str, Any]) -> list[str]:
    return [
        f"  left out: {prefix}.* {group['tensors']} tensors, {_size(group['bytes'])} ({group['reason']})"
        for prefix, group in report["left_out"].items()
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
