"""The backend cpu: what multiplies what, how that is measured and fixed, and what is said without the library."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from covo_npu.kernels import native, select
from covo_npu.kernels.cpu import CPU, choice, library
from covo_npu.kernels.cpu.choice import Choice
from covo_npu.kernels.errors import BackendError

SOURCES = Path(library.FILE).parent / "csrc"
BFLOAT16 = torch.bfloat16
N, K = choice.MEASURED_BYTES // 2048, 1024  # just large enough to be measured


def test_the_library_is_built_from_the_sources_beside_it() -> None:
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert library.library().covo_sources().decode() == digest, "run: python setup.py build_ext --inplace"


def test_sets_of_this_machine() -> None:
    known = library.known_sets()
    assert known in (
        ("amx", "avx512_bf16", "avx512", "avx2", "portable"),
        ("neon_bf16", "neon", "portable"),
        ("portable",),
    )
    assert library.usable_sets()[-1] == "portable"


@pytest.mark.parametrize("limit", library.known_sets())
def test_the_best_set_can_be_limited(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.LIMIT, raising=False)
    everything = library.usable_sets()
    monkeypatch.setenv(library.LIMIT, limit)
    below = library.known_sets()[library.known_sets().index(limit) :]
    assert library.usable_sets() == tuple(name for name in everything if name in below)
    assert Choice.unmeasured().instructions == library.usable_sets()[0]


def test_an_unknown_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.LIMIT, "sse9")
    with pytest.raises(BackendError, match="COVO_MAX_CPU_ISA=sse9: unknown instruction set; there are "):
        library.usable_sets()


def test_fixed_products() -> None:
    weight, x = torch.randn(40, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    device = torch.device("cpu")
    ours, theirs = (select.select("cpu", device, products=name) for name in (choice.OURS, choice.PYTORCH))
    assert isinstance(ours, CPU) and ours.choice.fixed == "covo"
    assert torch.equal(theirs.linear(x, weight), native.linear(x, weight))
    assert torch.equal(ours.linear(x, weight), library.linear(library.usable_sets()[0], x, weight, None, None))
    with pytest.raises(BackendError, match="products must be covo or pytorch, found 'mkl'"):
        select.select("cpu", device, products="mkl")
    with pytest.raises(BackendError, match="backend native has one way to multiply: leave out --products covo"):
        select.select("native", device, products="covo")


def test_what_is_not_measured_follows_the_rule() -> None:
    weight = torch.empty(64, 64, dtype=BFLOAT16)
    assert [Choice("avx2").ours(rows, weight) for rows in (1, 8, 9, 384)] == [True, True, False, False]
    assert [Choice("amx").ours(rows, weight) for rows in (1, 384, 385)] == [True, True, False]
    assert not Choice("amx").ours(9, weight.half())


@pytest.mark.parametrize(("ours_s", "theirs_s", "expected"), [(1.0, 2.0, choice.OURS), (2.0, 1.0, choice.PYTORCH)])
def test_the_faster_one_is_chosen(ours_s: float, theirs_s: float, expected: str) -> None:
    """The clock says how long both took: begin, after C, after PyTorch."""

    def ticks() -> Iterator[float]:
        now = 0.0
        yield now  # of the whole measurement
        while True:
            for step in (0.0, ours_s, theirs_s):
                now += step
                yield now

    source = ticks()
    shapes = [(N, K, BFLOAT16), (N, K, torch.float32), (N - 1, K, BFLOAT16)]  # the last one fits into caches
    measured = choice.measure(shapes, lambda: next(source))
    served = [rows for rows in choice.ROWS if rows <= choice.MOST_ROWS_OF_VECTORS or measured.instructions == "amx"]
    assert {measured.measured[N, K, BFLOAT16, rows] for rows in served} == {expected}
    assert len(measured.measured) == len(choice.ROWS)  # nothing for float32
    weight = torch.empty(N, K, dtype=BFLOAT16)
    assert measured.ours(3, weight) == (expected == choice.OURS)
    assert not measured.ours(choice.ROWS[-1] + 1, torch.empty(N, K, dtype=torch.float16))
    assert f"{N} x {K} bfloat16, up to rows: 1 {expected}, 8 {expected}" in measured.describe()[1]


def test_the_measurement_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "covo_npu.kernels.cpu.choice"):
        backend = select.select(None, torch.device("cpu"), weights=[(N, K, BFLOAT16)])
    assert isinstance(backend, CPU) and backend.choice.measured
    assert f"{N} x {K} bfloat16, up to rows: 1 " in caplog.text and "measured in" in caplog.text


def test_float32_and_large_products_are_pytorchs() -> None:
    backend = CPU(Choice("portable"))
    for rows, dtype in ((1, torch.float32), (9, BFLOAT16)):
        x, weight = torch.randn(rows, 70).to(dtype), torch.randn(9, 70).to(dtype)
        assert torch.equal(backend.linear(x, weight), native.linear(x, weight))


@pytest.mark.parametrize("rows", [1, 9, 400])
@pytest.mark.parametrize("fixed", [choice.OURS, choice.PYTORCH])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
def test_eight_bit_weights(rows: int, fixed: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (40, 96), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(40, generator=generator) / 100, torch.randn(40, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T * scale.double() + bias.double()
    found = CPU(Choice.unmeasured(fixed)).linear_int8(x, weight, scale, bias)
    # PyTorch rounds the product before it is scaled, and the result; the float32 sums of 96 products are rounded, too
    sizes = x.double().abs() @ weight.double().abs().T * scale.double() + bias.double().abs()
    bound = torch.finfo(dtype).eps * (exact.abs() + bias.double().abs()) + 96**0.5 * 2**-23 * sizes
    assert found.dtype == dtype and ((found.double() - exact).abs() <= bound).all()
    assert ((found.double() - (exact - bias.double())).abs() > bound).any()


WITHOUT = """
import logging, sys
from pathlib import Path
import torch
from covo_npu.kernels import select
from covo_npu.kernels.cpu import library
library.FILE = Path(sys.argv[1])
logging.basicConfig(format="%(message)s")
print(select.select(None, torch.device("cpu")).name, library.missing(), sep="|")
try:
    select.select("cpu", torch.device("cpu"))
except Exception as error:
    print(type(error).__name__, str(error) == library.missing())
"""


@pytest.mark.parametrize("content", [None, b"no library"])
def test_without_the_library_native_serves_and_says_why(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "libcovo.so"
    if content is not None:
        file.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", WITHOUT, file], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    name, _, reason = first.partition("|")
    assert name == "native" and second == "BackendError True"
    assert ("no C compiler was found" if content is None else "cannot be loaded") in reason
    assert f"the backend native serves: {reason}" in done.stderr


@pytest.mark.slow
def test_the_c_tests_pass_here(tmp_path: Path) -> None:
    """The same cases in C alone, as they run for other processors in an emulator: make test-isa."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    assert compiler, "no C compiler"
    driver = Path(__file__).with_name("isa.c")
    program = tmp_path / "isa"
    sources = sorted(SOURCES.glob("*.c"))
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    subprocess.run([compiler, *options, "-o", program, driver, *sources, "-lm", "-lpthread"], check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(library.known_sets())
