"""Builds stand-ins for the CANN libraries, so that the genuine torch_npu imports on a machine without an NPU.

usage: python build.py OUT_DIR   (run by the Python in whose environment torch and torch_npu are installed)

Each symbol that torch_npu's libraries need and nothing provides becomes a stub that returns 0, unless cann.c has it.
The libraries that a CUDA build of torch needs get stand-ins in the same way: it then imports, and finds no GPU.
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
    "opapi",
)  # all symbols are in ascendcl

CUDA_SYMBOL = re.compile(r"U ((?:__cuda|cu|nccl|nvrtc|nvshmem)\w+)(?:@(\S+))?$", re.MULTILINE)
CUDA_ANSWERS = {"cudaGetDeviceCount": 100}  # cudaErrorNoDevice; the others say 0, success


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


def compile_shared(library: Path, *arguments: str | Path) -> None:
    """Write a shared library made of C files and options."""
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, *arguments], check=True)


def build_cuda(out: Path) -> int:
    """Write what a CUDA build of torch lacks here beside its libraries and return the number of stubs.

    One library under all names. Its symbols have the versions that the loader looks for. 0 for a CPU build, and for one
    that has them. out: torch/lib.
    """
    torch_libraries = sorted(out.glob("*.so"))
    listing = subprocess.run(["ldd", *map(str, torch_libraries)], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r"(\S+) => not found", listing))
    if not names:
        return 0
    command = ["nm", "-D", "--undefined-only", *map(str, torch_libraries)]
    wanted = dict(CUDA_SYMBOL.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    versions = sorted(set(wanted.values()) - {""})
    nodes = {version: [symbol for symbol in wanted if wanted[symbol] == version] for version in versions}
    (out / "cuda.map").write_text(
        "".join(f"{version} {{ global: {'; '.join(members)}; }};\n" for version, members in nodes.items())
    )
    (out / "cuda.c").write_text(
        "".join(f"int {symbol}(void) {{ return {CUDA_ANSWERS.get(symbol, 0)}; }}\n" for symbol in wanted)
    )
    compile_shared(out / "cuda.so", out / "cuda.c", f"-Wl,--version-script={out / 'cuda.map'}")
    for name in names:
        (out / name).symlink_to("cuda.so")
    return len(wanted)


def build(out: Path) -> int:
    """Write the libraries into out and return the number of stubs."""
    out.mkdir(parents=True, exist_ok=True)
    site_packages = Path(sysconfig.get_path("purelib"))
    cuda_stubs = build_cuda(site_packages / "torch/lib")
    written = set(re.findall(r"^(?:Error|size_t|const char \*)\s*(\w+)\(", CANN_C.read_text(), re.MULTILINE))
    stubs = [symbol for symbol in missing_symbols(site_packages) if symbol not in written]
    (out / "stubs.c").write_text("".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in stubs))
    (out / "empty.c").write_text("")
    compile_shared(out / "libascendcl.so", CANN_C, out / "stubs.c")
    for name in EMPTY_LIBRARIES:
        compile_shared(out / f"lib{name}.so", out / "empty.c", f"-L{out}", "-Wl,--no-as-needed", "-lascendcl")
    return len(stubs) + cuda_stubs


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.stdout.write(f"{build(folder)} stubs -> {folder}\n")
