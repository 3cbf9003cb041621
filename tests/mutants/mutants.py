"""Mutation check of the numerical core: a dozen and more wrong programs, each of which the tests must refuse.

usage: python tests/mutants/mutants.py [--converted FOLDER] [NAME...]

A mutant is one changed line in a copy of the packages. A few tests that are near to it run on that copy, in a process
forked from this one, which has imported PyTorch once. Before that they must pass on the copy as it is. Prints a line
for each mutant; exit code 1 if one survives, or if a mutant no longer finds its line.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("convert", "runtime", "kernels", "serve", "tools")
PRELOADED = ("torch", "numpy", "pytest", "soundfile", "tokenizers", "safetensors.torch", "hypothesis",
             "transformers.generation.logits_process")  # fmt: skip
PASSED, FAILED = 0, 1  # pytest's exit codes; others mean that the tests did not run

KERNELS = ("tests/kernels/test_kernels.py::test_backend_computes_the_textbook", "-k", "native")
VOCODER_KERNELS = ("tests/kernels/test_vocoder_kernels.py::test_whole_signals_of_any_length", "-k", "native")
TRITON = ("tests/kernels/test_cuda_products.py", "-k", "roundings and bfloat16")
DIALOGUE = ("tests/runtime/test_goldens.py::test_dialogue_token_for_token", "-k", "two_rounds")
SAMPLING = ("tests/runtime/test_sampling.py",)
FLOW = ("tests/runtime/test_flow.py",)
SPEECH = ("tests/runtime/test_goldens.py::test_token2wav", "-k", "15")
MEL = ("tests/runtime/test_audio.py::test_mel_segments_and_placeholders_are_upstreams", "-k", "question_en")
RANKS = ("tests/convert/test_ranks.py::test_the_ranks_files_hold_each_row_and_column_of_the_whole_once", "-k", "head")
STEP = ("tests/tools/test_bench_decode.py", "-k", "of_the_file")
CAPTURED = ("tests/runtime/test_evaluations.py", "-k", "lengths_that_take_turns")
CONTEXT = ("tests/runtime/test_context.py", "-k", "textbook")
FOLD = ("tests/convert/test_transforms.py", "-k", "weight_norm")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: `right`, which stands once in the file, becomes `wrong`; `tests` are to notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


QWEN2 = "runtime/networks/qwen2.py"
NATIVE, SAMPLER, TOKEN2WAV = "kernels/native.py", "runtime/sampling.py", "runtime/token2wav.py"
EVALUATIONS, DIT = "runtime/evaluations.py", "runtime/networks/dit.py"
ROWS = "cache.first_rows[slot] + {}[:, None]"
LAST = "round_.before, tuple(round_.tokens{})"
CHOICE = "torch.where(scores > 0, scores {} penalty, scores {} penalty)"
RECENT = "torch.cat((self._recent[slots, 1:], {}), dim=1)"
SCALES, ROW = "scales[{} : share.stop]", "head_dim * {}.itemsize"
STD = "self.mean + latents * self.std"
SINUSOID = "torch.cat((angles.{}(), angles.{}()))"

MUTANTS = (
    Mutant("mask", NATIVE, ".tril(length - num_queries)", ".tril(length - num_queries + 1)", KERNELS),
    Mutant("newest-key", NATIVE, "attended = max(lengths), None", "attended = max(lengths) - 1, None", KERNELS),
    Mutant("rotation", NATIVE, "value=-1)", "value=1)", KERNELS),
    Mutant("gate-and-up", NATIVE, "gate, up = gate_up.chunk", "up, gate = gate_up.chunk", KERNELS),
    Mutant("gelu", NATIVE, "return F.gelu(x)\n", 'return F.gelu(x, approximate="tanh")\n', KERNELS),
    Mutant("int8-scale", NATIVE, "* scale[rows].float()", "* scale[rows].float().mean()", KERNELS),
    Mutant("last-block", "kernels/cuda.py", "(0, size_in, BLOCK_K,", "(0, size_in - BLOCK_K + 1, BLOCK_K,", TRITON),
    Mutant("scales-of-a-rank", "convert/write.py", SCALES.format("share.start"), SCALES.format("share.zeros"), RANKS),
    Mutant("step-bytes", "tools/bench/decode.py", ROW.format("model.dtype"), ROW.format("llm.lm_head.weight"), STEP),
    Mutant("anti-alias", NATIVE, "for first in (11, 10)", "for first in (10, 11)", VOCODER_KERNELS),
    Mutant("edge", NATIVE, "even[..., -3:] = odd[..., -3:-2]", "even[..., -3:] = odd[..., -2:-1]", VOCODER_KERNELS),
    Mutant("frequencies", "runtime/networks/rotary.py", "/ head_dim)", "/ (head_dim + 2))", DIALOGUE),
    Mutant("cache-rows", QWEN2, ROWS.format("positions"), ROWS.format("positions.flip(0)"), DIALOGUE),
    Mutant("last-token", "runtime/engine.py", LAST.format("[:-1]"), LAST.format(""), DIALOGUE),
    Mutant("penalty", SAMPLER, CHOICE.format("/", "*"), CHOICE.format("*", "/"), SAMPLING),
    Mutant("window", SAMPLER, RECENT.format("ids[:, None]"), RECENT.format("self._recent[slots, :1]"), SAMPLING),
    Mutant("forgetting", SAMPLER, "_seen[slot].zero_().scatter_", "_seen[slot].scatter_", SAMPLING),
    Mutant("midpoint", "runtime/flow.py", "alpha=step / 2)", "alpha=step)", FLOW),
    Mutant("guidance", "runtime/flow.py", "1 + cfg_alpha)", "cfg_alpha)", FLOW),
    Mutant(
        "prompt-frames", TOKEN2WAV, "latents[known_latents.shape[0] :]", "latents[known_latents.shape[0] + 1 :]", SPEECH
    ),
    Mutant("old-frames", EVALUATIONS, "self._latents[num_frames:].zero_()", "pass", CAPTURED),
    Mutant("all-frames", EVALUATIONS, "device=inputs.device) < num_frames", "device=inputs.device) >= 0", CAPTURED),
    Mutant(
        "old-time", EVALUATIONS, "(self._mask, mask), (self._rows, modulation.rows))", "(self._mask, mask))", CAPTURED
    ),
    Mutant("context-place", DIT, "cos[:, -length:], sin[:, -length:]", "cos[:, :length], sin[:, :length]", CONTEXT),
    Mutant("context-inputs", DIT, "rows.inputs[:, -reach:]", "rows.inputs[:, :reach]", CONTEXT),
    Mutant("context-code", DIT, "torch.cat((last_code, codes))", "torch.cat((codes[:1], codes))", CONTEXT),
    Mutant("statistics", TOKEN2WAV, STD, f"{STD}.square()", SPEECH),
    Mutant("time", DIT, SINUSOID.format("cos", "sin"), SINUSOID.format("sin", "cos"), SPEECH),
    Mutant("mel-floor", "runtime/audio.py", "logarithm.amax() - 8.0", "logarithm.amax() - 7.0", MEL),
    Mutant("weight-norm", "convert/transforms.py", "dim=tuple(range(1, v.ndim))", "dim=tuple(range(v.ndim))", FOLD),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the tests of one copy ended: pytest's exit code, seconds, and what it printed."""

    code: int
    seconds: float
    output: str


def run_tests(tree: Path, tests: tuple[str, ...]) -> Outcome:
    """Return how tests end on the packages in a tree, in a process forked from this one."""
    begin = time.monotonic()
    log = tree / "log"
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["PYTHONPATH"] = str(tree)  # for the processes that tests start
        sys.path.insert(0, str(tree))
        import pytest

        nodes = [str(ROOT / test) if test.startswith("tests/") else test for test in tests]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        code = int(pytest.main([*options, *nodes]))
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return Outcome(os.waitstatus_to_exitcode(status), time.monotonic() - begin, log.read_text("utf-8", "replace"))


def trees(mutant: Mutant | None) -> Path:
    """Return a copy of the packages with a mutant's fault, or without one. Raises LookupError if its line is gone."""
    tree = Path(tempfile.mkdtemp(prefix="mutant-"))
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / "covo_npu" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant:
        path = tree / "covo_npu" / mutant.file
        text = path.read_text("utf-8")
        if text.count(mutant.right) != 1:
            shutil.rmtree(tree)
            raise LookupError(f"{mutant.file} holds {mutant.right!r} {text.count(mutant.right)} times, expected once")
        path.write_text(text.replace(mutant.right, mutant.wrong), "utf-8")
    return tree


def outcomes(mutants: Iterable[Mutant]) -> Iterator[tuple[str, bool, str]]:
    """Yield (name, whether all is well, what happened): first that each group of tests passes, then each mutant."""
    chosen = list(mutants)
    for tests in dict.fromkeys(mutant.tests for mutant in chosen):
        tree = trees(None)
        outcome = run_tests(tree, tests)
        shutil.rmtree(tree)
        well = outcome.code == PASSED
        yield f"unchanged: {tests[0]}", well, f"{outcome.seconds:.1f} s" if well else outcome.output[-2000:]
    for mutant in chosen:
        try:
            tree = trees(mutant)
        except LookupError as error:
            yield mutant.name, False, f"{error}: update the mutant"
            continue
        outcome = run_tests(tree, mutant.tests)
        shutil.rmtree(tree)
        if outcome.code == FAILED:
            yield mutant.name, True, f"caught in {outcome.seconds:.1f} s"
        elif outcome.code == PASSED:
            yield mutant.name, False, f"survived {mutant.tests[0]}"
        else:
            yield mutant.name, False, f"the tests did not run (exit code {outcome.code}): {outcome.output[-1000:]}"


def main() -> int:
    """Return 1 if a mutant survived."""
    parser = argparse.ArgumentParser(description="Mutation check of the numerical core.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(mutant.name for mutant in MUTANTS)}")
    parser.add_argument("--converted", help="folder of converted checkpoints, see tests/conftest.py")
    options = parser.parse_args()
    if unknown := set(options.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "COVO_TEST_CONVERTED": options.converted or tempfile.mkdtemp(prefix="mutants-"),
    }
    for module in PRELOADED:
        importlib.import_module(module)
    well = True
    for name, holds, says in outcomes(mutant for mutant in MUTANTS if mutant.name in (options.names or [mutant.name])):
        print(f"{'ok' if holds else 'FAIL':<5} {name:<16} {says}", flush=True)
        well = well and holds
    if not options.converted:
        shutil.rmtree(os.environ["COVO_TEST_CONVERTED"])
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
