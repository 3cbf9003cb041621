"""What will be done, before anything is done: rules x source -> steps, every tensor checked.

The targets' names and shapes come twice, from the rules and from the networks themselves; both must agree.
"""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from covo_npu.convert import rules
from covo_npu.convert.downloads import AGAIN
from covo_npu.convert.errors import Kind, refuse
from covo_npu.convert.rules import Operation, Part, Rule, Section, Split
from covo_npu.convert.shards import DTYPES, INDEX, SourceTensor
from covo_npu.convert.sizes import LETTERS
from covo_npu.convert.source import SourceCheckpoint
from covo_npu.runtime.checkpoint.config import ModelConfig
from covo_npu.runtime.checkpoint.format import INT8
from covo_npu.runtime.networks.files import expected_tensors

Shape = tuple[int, ...]

SHARED = "llm"  # the file of which each tensor-parallel rank has its own
CONVERTIBLE = ("BF16", "F16", "F32", "F64")
QUANTISED = (
    "Quantised weights (FP8, INT8, 4 bits) are not supported; use the bfloat16, float16 or float32 checkpoint that "
    "they were made of."
)
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # torch's dtype -> safetensors' spelling


@dataclass(frozen=True, slots=True)
class Need:
    """A tensor that the source must hold, with this shape. Without a name: zeros."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """A rule for one model: all names and shapes filled in. dtype None: as asked with --dtype."""

    target: str
    file: str
    operation: Operation
    needs: tuple[Need, ...]
    dtype: str | None
    split: Split


@dataclass(frozen=True, slots=True)
class Share:
    """The entries start .. stop - 1 along an axis, and `zeros` entries behind them."""

    axis: int
    start: int
    stop: int
    zeros: int


@dataclass(frozen=True, slots=True)
class Step:
    """One target tensor: its recipe and what the source has for each of its needs, None for zeros.

    rank of size: whose part of the tensor it is, of a file that the ranks share.
    """

    recipe: Recipe
    dtype: str  # safetensors' spelling
    shape: Shape
    sources: tuple[SourceTensor | None, ...]
    rank: int = 0
    size: int = 1

    @property
    def file(self) -> str:
        """Name of the file that it lies in."""
        return file_name(self.recipe.file, self.rank, self.size)

    def share(self, shape: Shape) -> Share | None:
        """Return which part of an input of some shape is in it, None if all of it is."""
        axis = self.recipe.split.axis
        if self.size == 1 or axis is None or axis >= len(shape):
            return None
        length = -(-shape[axis] // self.size)
        start = min(self.rank * length, shape[axis])
        stop = min(start + length, shape[axis])
        return Share(axis, start, stop, length - (stop - start))

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
    weights: str  # of the LLM's products: that dtype, or a word of INT8
    steps: tuple[Step, ...]
    left_out: Mapping[str, LeftOut]
    tp: int = 1

    def files(self) -> dict[str, list[Step]]:
        """Return the steps of each file by its name, the ranks in order."""
        files: dict[str, list[Step]] = {}
        for step in sorted(self.steps, key=lambda step: step.rank):  # stable
            files.setdefault(step.file, []).append(step)
        return files

    @property
    def ranks(self) -> list[str]:
        """The names of the ranks' files."""
        return [file_name(SHARED, rank, self.tp) for rank in range(self.tp)]

    @property
    def bytes(self) -> int:
        """Size of all target tensors."""
        return sum(step.bytes for step in self.steps)

    @property
    def layer_bytes(self) -> int:
        """Size of the LLM's layers, through which the system prompt goes."""
        return sum(step.bytes for step in self.steps if step.recipe.target.startswith("llm.layers."))


def file_name(stem: str, rank: int = 0, size: int = 1) -> str:
    """Return the name of a file of the checkpoint, or of a rank's if it is the one that they share."""
    return f"{stem}-rank{rank}of{size}.safetensors" if stem == SHARED else f"{stem}.safetensors"


def make_plan(source: SourceCheckpoint, dtype: torch.dtype, weights: str | None = None, tp: int = 1) -> Plan:
    """Return the plan for a source. dtype: of the LLM and the encoder; token2wav is float32.

    weights: a word of INT8, which of the LLM's products are held in 8 bits instead; tp: ranks of the LLM.

    Raises ConvertError that names every missing and misshapen tensor and every dtype that cannot be converted,
    ConfigError if the model cannot be split into so many ranks.
    """
    missing, misshapen, inconvertible, unlisted = [], [], [], []
    steps: list[Step] = []
    used: set[str] = set()
    weights = weights or str(dtype).removeprefix("torch.")
    int8 = INT8.get(weights, ())
    expected = expected_tensors(source.config, int8, tp).values()
    shapes = {name: shape for tensors in expected for name, shape in tensors.items()}
    for recipe in recipes(source.config, source.tensors, int8):
        sources = tuple(source.tensors.get(need.name) for need in recipe.needs)
        for need, found in zip(recipe.needs, sources, strict=True):
            if need.name and found is None:
                missing.append(f"{need.name}: expected {list(need.shape)}")
            elif found and found.shape != need.shape:
                misshapen.append(f"{need.name}: expected {list(need.shape)}, found {list(found.shape)} in {found.file}")
            elif found and found.dtype not in CONVERTIBLE and not (found.dtype == recipe.dtype == "I64"):
                inconvertible.append(f"{need.name}: {found.dtype} in {found.file}")
            if found and not found.listed:
                unlisted.append(f"{need.name}: in {found.file}")
        used.update(need.name for need in recipe.needs)
        size = tp if recipe.file == SHARED else 1
        made = recipe.dtype or NAMES[dtype]
        steps += [Step(recipe, made, shapes[recipe.target], sources, rank, size) for rank in range(size)]
    belong = "Do config.json and the weights belong together?"
    refuse(
        str(source.folder),
        Kind("tensors are missing", dict.fromkeys(missing), belong),
        Kind("tensors have another shape than the networks need", dict.fromkeys(misshapen), belong),
        Kind("tensors have a dtype that cannot be converted", dict.fromkeys(inconvertible), QUANTISED),
        Kind(f"tensors that are needed are not in {INDEX}", dict.fromkeys(unlisted), AGAIN),
    )
    assert {step.recipe.target for step in steps} == shapes.keys(), "rules and networks name the same tensors"
    return Plan(source.config, dtype, weights, tuple(steps), left_out(source.tensors, used), tp)


def recipes(
    config: ModelConfig, tensors: Mapping[str, object] | None = None, int8: Collection[str] = ()
) -> Iterator[Recipe]:
    """Yield the rules for one model in file order.

    tensors: the names that a `*` in a rule may match; int8: see Qwen2.
    """
    parts = (rules.llm(int8), *rules.MODEL, *(rules.SPEECH if config.token2wav else ()))
    names = tuple(tensors or ())
    for part in parts:
        for section in part.rules:
            yield from _expand(part, section, "", "", {}, config, names)


def left_out(tensors: Mapping[str, SourceTensor], used: set[str]) -> dict[str, LeftOut]:
    """Return what is not used, by the shortest prefix that no used tensor shares; numbers before its end read `{}`.

    What no manifest may hold is escaped: a name with a line feed, with half a character.
    """
    needed = {name[:end] for name in used for end in (i for i, char in enumerate(name) if char == ".")}
    groups: dict[str, list[SourceTensor]] = defaultdict(list)
    why: dict[str, dict[str, None]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if name not in used:
            words = name.split(".")
            prefixes = (".".join(words[: n + 1]) for n in range(len(words)))
            prefix = next((p for p in prefixes if p not in needed), name)
            label = re.sub(r"\.\d+(?=\.)", ".{}", prefix if prefix.isprintable() else ascii(prefix)[1:-1])
            reasons = (reason for pattern, reason in rules.LEFT_OUT if fnmatch.fnmatchcase(name, pattern))
            why[label][next(reasons, rules.NOT_NEEDED) if tensor.listed else rules.NOT_LISTED] = None
            groups[label].append(tensor)
    return {
        label: LeftOut(len(group), sum(tensor.bytes for tensor in group), "; ".join(why[label]))
        for label, group in sorted(groups.items())
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
    for entry in rule.inputs:
        name = (source + entry.name).format(**values) if entry.name else ""
        shape = tuple(int(word) if word.isdigit() else values[word] for word in entry.shape.split())
        matches = fnmatch.filter(names, name) if "*" in name else [name]
        needs += [Need(match, shape) for match in sorted(matches) or [name]]
    target = (target + rule.target).format(**values)
    return Recipe(target, part.file, rule.operation, tuple(needs), rule.dtype or part.dtype, rule.split)
