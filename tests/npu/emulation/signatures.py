"""Holds each call of a fused operator against its signature in torch_npu 2.9 (CANN 8.5), the oldest that we serve."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SCHEMAS = Path(__file__).with_name("torch_npu-2.9-schemas.txt")
RUNS_2_9 = torch.__version__.startswith("2.9.")  # the oldest version itself, see README.md


class SignatureError(TypeError):
    """A call that torch_npu 2.9 would reject, or read otherwise than torch_npu 2.13."""


def parse(line: str) -> tuple[str, inspect.Signature]:
    """Return (name, signature) of one schema line: name(Type name=default, ..., *, ...) -> ..."""
    name, _, rest = line.partition("(")
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    for item in re.split(r", (?![^(]*\))", rest.rpartition(") -> ")[0]):
        if item == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        declared, _, default = item.partition("=")
        value = default if default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(declared.split()[-1], kind, default=value))
    return name, inspect.Signature(parameters)


def load() -> dict[str, inspect.Signature]:
    """Return {operator: signature} of the schema file, overloads left out."""
    lines = [line for line in SCHEMAS.read_text().splitlines() if line and not line.startswith("#")]
    return {name: signature for name, signature in map(parse, lines) if "." not in name}


def normal(default: str) -> str:
    """Return a default in one spelling: 1. and 1.0, "BSH" and 'BSH', 1e-06 and 9.9999999999999995e-07."""
    try:
        return str(float(default))
    except ValueError:
        return default.strip("\"'")


def guarded(
    name: str, function: Callable[..., Any], old: inspect.Signature, new: inspect.Signature
) -> Callable[..., Any]:
    """Return function, checked: it binds in 2.9, and what it leaves out has one default in both versions."""
    drifted = {
        parameter
        for parameter in old.parameters.keys() & new.parameters.keys()
        if normal(str(old.parameters[parameter].default)) != normal(str(new.parameters[parameter].default))
    }

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = old.bind(*args, **kwargs)
        except TypeError as error:
            raise SignatureError(f"torch_npu 2.9: {name}: {error}") from error
        if left_out := drifted - bound.arguments.keys():
            raise SignatureError(
                f"{name}: the default of {', '.join(sorted(left_out))} changed after torch_npu 2.9; pass it"
            )
        return function(*args, **kwargs)

    return checked


def guard(torch_npu: ModuleType) -> None:
    """Put the check in front of every npu_* function of torch_npu; one that 2.9 lacks in our list is refused."""
    known = load()
    for name in [name for name in dir(torch_npu) if name.startswith(("npu_", "scatter_update"))]:
        function = getattr(torch_npu, name)
        if name in known:
            packet = getattr(torch_npu._C and __import__("torch").ops.npu, name)
            new = parse(str(packet.default._schema).partition("::")[2])[1]
            setattr(torch_npu, name, guarded(name, function, known[name], new))
        elif callable(function):
            setattr(torch_npu, name, unknown(name))


def unknown(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise SignatureError(f"{name} is not in {SCHEMAS.name}; add its torch_npu 2.9 signature before using it")

    return refuse
