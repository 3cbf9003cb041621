"""What will be done, before anything is done: rules x source -> steps, every tensor checked.

The targets' names and shapes come twice, from the rules and from the networks themselves; both must agree.
"""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from covo_npu.convert import rules, transforms
from covo_npu.convert.errors import refuse
from covo_npu.convert.rules import Part, Rule, Section
from covo_npu.convert.sizes import LETTERS
from covo_npu.convert.source import DTYPES, Source, SourceTensor
from covo_npu.runtime.config import ModelConfig
from covo_npu.runtime.model import expected_tensors

Shape = tuple[int, ...]
Compute = Callable[..., Tensor]

# What each operation computes; None: the sources' bytes one after another, cast where the dtype changes.
OPERATIONS: dict[str, Compute | None] = {
    rules.ROWS: None,
    rules.FLAT: transforms.flat,
    rules.FOLD: transforms.fold_weight_norm,
    rules.EXP: transforms.exp,
    rules.INVERSE_BETA: transforms.inverse_beta,
    rules.MEAN: transforms.mean,
    rules.STD: transforms.std,
    rules.EQUAL: transforms.equal,
    rules.MEL_FILTERS: transforms.mel_filters,
}
CONVERTIBLE = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # torch's dtype -> safetensors' spelling


@dataclass(frozen=True, slots=True)
class Need:
    """A tensor that the source must hold, with this shape. Without a name: zeros."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """A rule for one model: all names and shapes filled in."""

    target: str
    file: str
    operation: str
    needs: tuple[Need, ...]
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """One target tensor: how it is made and of what. A source of None stands for zeros."""

    target: str
    file: str
    operation: str
    dtype: str  # safetensors' spelling
    shape: Shape
    needs: tuple[Need, ...]
    sources: tuple[SourceTensor | None, ...]
    compute: Compute | None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The target's dtype in torch's terms."""
        return DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        """Size in the target."""
        return prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Source tensors that have no place in the target."""

    tensors: int
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps in file order, and what is left out by prefix of the source names."""

    config: ModelConfig
    dtype: torch.dtype
    steps: tuple[Step, ...]
    left_out: Mapping[str, LeftOut]

    def files(self) -> dict[str, list[Step]]:
        """Return the steps of each file stem."""
        files: dict[str, list[Step]] = {}
        for step in self.steps:
            files.setdefault(step.file, []).append(step)
        return files

    @property
    def bytes(self) -> int:
        """Size of all target tensors."""
        return sum(step.bytes for step in self.steps)


def make_plan(source: Source, dtype: torch.dtype) -> Plan:
    """Return the plan for a source. dtype: of the LLM and the encoder; token2wav is float32.

    Raises ConvertError that names every missing and misshapen tensor and every dtype that cannot be converted.
    """
    missing, misshapen, inconvertible = [], [], []
    steps: list[Step] = []
    used: set[str] = set()
    shapes = {name: shape for tensors in expected_tensors(source.config).values() for name, shape in tensors.items()}
    for recipe in recipes(source.config, source.tensors):
        needs = recipe.needs
        for need in needs:
            found = source.tensors.get(need.name)
            if need.name and found is None:
                missing.append(f"{need.name}: expected {list(need.shape)}")
            elif found and found.shape != need.shape:
                misshapen.append(f"{need.name}: expected {list(need.shape)}, found {list(found.shape)} in {found.file}")
            elif found and found.dtype not in CONVERTIBLE and recipe.dtype is None:
                inconvertible.append(f"{need.name}: {found.dtype} in {found.file}")
        used.update(need.name for need in needs)
        steps.append(_step(recipe, source, dtype, shapes.get(recipe.target, ())))
    refuse(
        str(source.folder),
        {
            "tensors are missing": dict.fromkeys(missing),
            "tensors have another shape than the networks need": dict.fromkeys(misshapen),
            "tensors have a dtype that is not a floating point number": dict.fromkeys(inconvertible),
        },
        "Do config.json and the weights belong together?",
    )
    assert {step.target for step in steps} == set(shapes), "rules and networks name the same tensors"
    return Plan(source.config, dtype, tuple(steps), left_out(source.tensors, used))


def recipes(config: ModelConfig, tensors: Mapping[str, object] | None = None) -> Iterator[Recipe]:
    """Yield the rules for one model in file order. tensors: the names that a `*` in a rule may match."""
    parts = (*rules.MODEL, *(rules.SPEECH if config.token2wav else ()))
    names = tuple(tensors or ())
    for part in parts:
        for section in part.rules:
            yield from _expand(part, section, "", "", {}, config, names)


def left_out(tensors: Mapping[str, SourceTensor], used: set[str]) -> dict[str, LeftOut]:
    """Return what is not used, by the shortest prefix that no used tensor shares; numbers before its end read `{}`."""
    needed = {name[:end] for name in used for end in (i for i, char in enumerate(name) if char == ".")}
    groups: dict[tuple[str, str], list[SourceTensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        if name not in used:
            words = name.split(".")
            prefixes = (".".join(words[: n + 1]) for n in range(len(words)))
            prefix = next((p for p in prefixes if p not in needed), name)
            label = re.sub(r"\.\d+(?=\.)", ".{}", prefix)
            reason = next(
                (why for pattern, why in rules.LEFT_OUT if fnmatch.fnmatchcase(name, pattern)), rules.NOT_NEEDED
            )
            groups[label, reason].append(tensor)
    return {
        label: LeftOut(len(group), sum(tensor.bytes for tensor in group), reason)
        for (label, reason), group in sorted(groups.items())
    }


def _expand(
    part: Part,
    section: Section,
    target: str,
    source: str,
    at: Mapping[str, int],
    config: ModelConfig,
    names: tuple[str, ...],
) -> Iterator[Recipe]:
    target, source = target + section.target, source + section.source
    index, letter = section.over or ("", "")
    count = LETTERS[part.letters](config, at)[letter] if letter else 1
    for number in range(count):
        here = {**at, index: number} if index else at
        letters = LETTERS[part.letters](config, here)
        for rule in section.rules:
            if isinstance(rule, Section):
                yield from _expand(part, rule, target, source, here, config, names)
            else:
                yield _recipe(part, rule, target, source, {**letters, **here}, names)


def _recipe(
    part: Part, rule: Rule, target: str, source: str, values: Mapping[str, int], names: tuple[str, ...]
) -> Recipe:
    needs = []
    for entry in rule.sources:
        name = (source + entry.name).format(**values) if entry.name else ""
        shape = tuple(int(word) if word.isdigit() else values[word] for word in entry.shape.split())
        matches = fnmatch.filter(names, name) if "*" in name else [name]
        needs += [Need(match, shape) for match in sorted(matches) or [name]]
    return Recipe((target + rule.target).format(**values), part.file, rule.operation, tuple(needs), rule.dtype)


def _step(recipe: Recipe, source: Source, dtype: torch.dtype, shape: Shape) -> Step:
    file_dtype = torch.float32 if recipe.file == "token2wav" else dtype
    compute = OPERATIONS[recipe.operation]
    if recipe.operation == rules.MEL_FILTERS:
        compute = partial(transforms.mel_filters, source.config.encoder.num_mels)
    return Step(
        target=recipe.target,
        file=recipe.file,
        operation=recipe.operation,
        dtype=recipe.dtype or NAMES[file_dtype],
        shape=shape,
        needs=recipe.needs,
        sources=tuple(source.tensors.get(need.name) for need in recipe.needs),
        compute=compute,
    )
