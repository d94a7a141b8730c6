"""Write sweep files for tests, and start tools/sweep.py on them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.program import ROOT

TOOL = ROOT / "tools" / "sweep.py"

# A run file of a tiny model; vocabulary and tokens are those of tests/helpers/tiny.py.
RUN = """
[model]
hidden_size = 16
num_layers = 1
num_attention_heads = 2
ffn_hidden_size = 32
vocab_size = 101
vocab_size_multiple = 8
[data]
train = ["{tokens}"]
[data.valid]
heldout = "{tokens}"
[batch]
global_batch_size = 4
micro_batch_size = 4
sequence_length = 16
[optimizer]
learning_rate = 3e-3
warmup_steps = 2
[train]
steps = 6
seed = 7
precision = "fp32"
device = "cpu"
evaluate_interval = 3
evaluate_batches = 2
[checkpoint]
interval = 3
[telemetry]
tensorboard = false
progress = "off"
peak_tflops = 1.0
[run]
directory = "unused"
"""


def write_sweep(folder: Path, text: str, *, tokens: str = "nowhere") -> Path:
    """Write a sweep file with the tiny run file student.toml beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "student.toml").write_text(RUN.replace("{tokens}", tokens))
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def start_sweep(path: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """Start the program with its output piped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), str(path), "--output", str(out), *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sweep(path: Path, out: Path, *words: str) -> tuple[int, str]:
    """Run the program in this process; return exit code and output. It gets no signals."""
    return tool("sweep", str(path), "--output", str(out), *words)


def tool(name: str, *words: str) -> tuple[int, str]:
    """Run tools/NAME.py in this process; return exit code and output."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            code = module.main(list(words))
        finally:
            del sys.modules[name]
    return code, printed.getvalue()
