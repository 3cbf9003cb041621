"""Builds stand-ins for the CANN libraries, so that the genuine torch_npu imports on a machine without an NPU.

usage: python build.py OUT_DIR   (run by the Python in whose environment torch and torch_npu are installed)

Each symbol that torch_npu's libraries need and nothing provides becomes a stub that returns 0, unless cann.c has it.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

CANN_C = Path(__file__).with_name("cann.c")
EMPTY_LIBRARIES = (
    "hccl",
    "acl_op_compiler",
    "ge_runner",
    "graph",
    "acl_tdt_channel",
    "atb",
)  # all symbols are in ascendcl


def symbols(library: Path, which: str) -> dict[str, str]:
    """Return {symbol: nm's letter for its kind} of a shared library. which: --undefined-only or --defined-only."""
    listing = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return {words[-1].split("@")[0]: words[-2] for words in map(str.split, listing.splitlines()) if words}


def missing_symbols(site_packages: Path) -> list[str]:
    """Return the functions that torch_npu wants and neither itself, torch, Python nor the system provides."""
    npu = [*site_packages.glob("torch_npu/lib/*.so"), *site_packages.glob("torch_npu/_C*.so")]
    listing = subprocess.run(["ldd", *map(str, npu)], capture_output=True, text=True).stdout
    system = {Path(path) for path in re.findall(r"(/\S+) \(0x", listing) if "torch_npu" not in path}
    provided = {
        symbol
        for library in {*npu, *site_packages.glob("torch/lib/*.so"), *system}
        for symbol in symbols(library, "--defined-only")
    }
    wanted = {symbol for library in npu for symbol, kind in symbols(library, "--undefined-only").items() if kind == "U"}
    return sorted(symbol for symbol in wanted - provided if not symbol.startswith(("Py", "_Py")))


def build(out: Path) -> int:
    """Write the libraries into out and return the number of stubs."""
    out.mkdir(parents=True, exist_ok=True)
    written = set(re.findall(r"^(?:Error|size_t|const char \*)\s*(\w+)\(", CANN_C.read_text(), re.MULTILINE))
    stubs = [symbol for symbol in missing_symbols(Path(sysconfig.get_path("purelib"))) if symbol not in written]
    (out / "stubs.c").write_text("".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in stubs))
    (out / "empty.c").write_text("")
    compile_shared = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-w"]
    subprocess.run([*compile_shared, "-o", out / "libascendcl.so", CANN_C, out / "stubs.c"], check=True)
    for name in EMPTY_LIBRARIES:
        link = [f"-L{out}", "-Wl,--no-as-needed", "-lascendcl"]
        subprocess.run([*compile_shared, "-o", out / f"lib{name}.so", out / "empty.c", *link], check=True)
    return len(stubs)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.stdout.write(f"{build(folder)} stubs -> {folder}\n")
