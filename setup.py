"""Builds covo-npu: the four folders of the repository are the import packages covo_npu.<folder>."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

if "develop" in sys.argv:
    sys.exit("covo-npu: 'setup.py develop' would install a package that cannot be imported; use: pip install -e .")

FOLDERS = ("convert", "runtime", "kernels", "tools")
CONVERT = ["transformers>=4.57"]  # only where a checkpoint has vocab.json and merges.txt but no tokenizer.json

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
    package_data={f"covo_npu.{folder}": ["py.typed", "data/*"] for folder in FOLDERS},
    entry_points={
        "console_scripts": [
            "covo-convert=covo_npu.convert.cli:main",
            "covo-run=covo_npu.runtime.cli:main",
            "covo-synth=covo_npu.tools.synth:main",
            "covo-bench=covo_npu.tools.bench:main",
            "covo-check=covo_npu.tools.check:main",
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
        "npu": ["torch_npu"],
        "dev": [
            *CONVERT,
            "librosa",
            "torchdiffeq",
            "matplotlib",
            "pytest",
            "pytest-cov",
            "hypothesis",
            "setuptools>=70.1",
            "ruff",
            "mypy",
        ],
    },
)
