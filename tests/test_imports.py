"""The house: which way imports point, what is imported when, and that a wheel holds all of it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "runtime": {"runtime", "kernels"},
    "convert": {"convert", "runtime", "kernels"},
    "serve": {"serve", "runtime", "kernels"},
    "tools": {"tools", "serve", "convert", "runtime", "kernels"},
}
WEB = ("starlette", "uvicorn", "prometheus_client", "pythonjsonlogger", "ray")  # only serve/ imports them
HEAVY = ("transformers", "librosa", "torchdiffeq", "scipy", "numba", "einops", "torch_npu")
MODULES = sorted(
    "covo_npu." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in MAY_IMPORT
    for path in (ROOT / folder).rglob("*.py")
)


def offences(path, text):
    """Return "path:line: what" for every import in a source text that the house does not allow."""
    folder = path.parts[0]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            # `from covo_npu import tools` names the folder after the import.
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
            if node.level:
                found.append((node.lineno, "relative import; write covo_npu.<folder>.<module>"))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # importlib.import_module("covo_npu...")
            names = re.findall(r"^covo_npu\.[\w.]+", node.value)
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top == "covo_npu" and target not in MAY_IMPORT[folder]:
                found.append((node.lineno, f"{folder} must not import {target}"))
            if top in MAY_IMPORT:
                found.append((node.lineno, f"import of {top} outside covo_npu; write covo_npu.{top}"))
            if top in WEB and folder != "serve":
                found.append((node.lineno, f"only serve imports {top}"))
            if top == "torch_npu" and path != Path("kernels/npu.py"):
                found.append((node.lineno, "only kernels/npu.py imports torch_npu"))
    return [f"{path}:{line}: {what}" for line, what in sorted(set(found))]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_direction_of_imports(folder):
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    found = [o for path in sources for o in offences(path.relative_to(ROOT), path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text", "what"),
    [
        ("runtime/x.py", "import json\nfrom covo_npu.convert.plan import plan", "2: runtime must not import convert"),
        ("kernels/x.py", "def f():\n    import covo_npu.runtime.audio", "2: kernels must not import runtime"),
        ("convert/x.py", "from covo_npu import tools", "1: convert must not import tools"),
        ("kernels/x.py", "import_module('covo_npu.tools.bench.cli')", "1: kernels must not import tools"),
        ("runtime/x.py", "from .audio import prepare", "1: relative import"),
        ("tools/x.py", "import kernels.npu", "1: import of kernels outside covo_npu"),
        ("tools/x.py", "from starlette.requests import Request", "1: only serve imports starlette"),
        ("runtime/x.py", "import covo_npu.serve.app", "1: runtime must not import serve"),
        ("serve/x.py", "from covo_npu.convert import plan", "1: serve must not import convert"),
        ("kernels/native.py", "import torch_npu", "1: only kernels/npu.py imports torch_npu"),
    ],
)
def test_direction_offences_are_noticed(path, text, what):
    (found,) = offences(Path(path), text)
    assert found.startswith(f"{path}:{what}")


def in_subprocess(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def imported_without(missing, modules):
    """Return the modules that can be imported in a process where others are missing."""
    program = f"""
import importlib, sys
for name in {missing}:
    sys.modules[name] = None
for name in {modules}:
    importlib.import_module(name)
    print(name)
"""
    return in_subprocess(program)


def test_every_module_but_one_is_importable_without_torch_npu():
    modules = [name for name in MODULES if name != "covo_npu.kernels.npu"]
    assert imported_without(["torch_npu"], modules) == modules
    program = """
import sys
sys.modules["torch_npu"] = None
from covo_npu.kernels.errors import BackendError
try:
    import covo_npu.kernels.npu
except BackendError as error:
    print(str(error).split()[:3])
"""
    assert in_subprocess(program) == ["['device',", "'npu:',", "'torch_npu']"]


def test_the_runtime_is_importable_without_what_only_conversion_and_tests_need():
    modules = [name for name in MODULES if name.split(".")[1] in ("kernels", "runtime") and name[-4:] != ".npu"]
    assert imported_without(HEAVY, modules) == modules


def test_covo_run_imports_nothing_heavy_at_start():
    program = f"import sys, covo_npu.runtime.cli.run\nprint(*set({(*HEAVY, 'torch')}) & set(sys.modules))"
    assert in_subprocess(program) == []


def test_covo_serve_imports_neither_torch_nor_a_web_framework_at_start():
    program = f"import sys, covo_npu.serve.cli\nprint(*set({(*HEAVY, *WEB, 'torch')}) & set(sys.modules))"
    assert in_subprocess(program) == []


@pytest.mark.slow
def test_what_the_runtime_imports_is_left_out_of_the_search_for_garbage():
    counted = "from covo_npu.runtime import CovoAudio\nprint(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    assert in_subprocess(f"import gc\n{counted}") == ["True", "True"]
    for command in ("runtime.cli.run", "serve.cli"):
        for threads in ("", ", '--threads', '1'"):
            start = f"from covo_npu.{command} import main\nmain(['--ckpt', '/nowhere'{threads}])"
            assert in_subprocess(f"import gc\n{start}\n{counted}") == ["True", "True"]
    # what a program has imported itself, and a collector that it has switched off, are the program's
    assert in_subprocess(f"import gc, torch\n{counted}") == ["True", "False"]
    assert in_subprocess(f"import gc\ngc.disable()\n{counted}") == ["False", "False"]
    failing = """
import gc, sys
sys.modules["tokenizers"] = None
try:
    from covo_npu.runtime import CovoAudio
except ImportError:
    print(gc.isenabled())
"""
    assert in_subprocess(failing) == ["True"]


def wheel(folder, **environment):
    """Return the path of a wheel that is built from a copy of the tree, with more in the environment."""
    tree = folder / "tree"
    made = shutil.ignore_patterns("__pycache__", "*.so")
    for name in MAY_IMPORT:
        shutil.copytree(ROOT / name, tree / name, ignore=made)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, tree]
    subprocess.run(build, check=True, capture_output=True, timeout=300, env={**os.environ, **environment})
    (found,) = folder.glob("covo_npu-*.whl")
    return found


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_data_file_and_the_library(tmp_path):
    built = wheel(tmp_path)
    with zipfile.ZipFile(built) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        commands = re.findall(r"^(covo-[a-z]+) = ([\w.]+):main$", archive.read(entry_points).decode(), re.M)
        archive.extractall(tmp_path / "installed")
    tree, sources = tmp_path / "tree", Path("kernels/cpu/csrc")
    files = {path.relative_to(tree) for f in MAY_IMPORT for path in (tree / f).rglob("*") if path.is_file()}
    expected = {f"covo_npu/{path}" for path in files if path.parent != sources}
    assert held == expected | {"covo_npu/kernels/cpu/libcovo.so"}
    assert {"covo_npu/runtime/data/system_prompt.txt", *(f"covo_npu/{f}/py.typed" for f in MAY_IMPORT)} <= held
    assert len(commands) == 6
    assert {module for _, module in commands} <= set(MODULES)
    assert built.name.startswith("covo_npu-0.1.0-py3-none-linux_")
    assert selected(tmp_path / "installed") == ["cpu"]


def test_without_a_compiler_the_package_installs_all_the_same(tmp_path):
    with zipfile.ZipFile(wheel(tmp_path, CC="/no/compiler")) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "installed")
    assert selected(tmp_path / "installed") == ["native"]


def selected(folder):
    """Return the name of the backend that serves a CPU in an installation."""
    program = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import torch
from covo_npu.kernels import __file__ as place, select
assert place.startswith({str(folder)!r}), place
print(select.select(None, torch.device("cpu")).name)
"""
    return in_subprocess(program)


def test_develop_installs_are_refused_with_a_hint():
    done = subprocess.run([sys.executable, "setup.py", "develop"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "pip install -e ." in done.stderr
