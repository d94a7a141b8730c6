"""Time preprocess_data.py beside Megatron-LM's tools/preprocess_data.py, and compare the bytes.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM
    python tools/bench_preprocess.py --megatron Megatron-LM --input text.jsonl
        --tokenizer tokenizer.model --workers 2 --rounds 5

Both get the same text, tokenizer and number of workers. Whole processes are timed, start-up
included, in turn; the ratio is formed within a round. Megatron-LM's tool reads SentencePiece models
and Hugging Face tokenizers, so a .tiktoken file is converted for it (not timed). Its own
requirements (six, transformers) must be installed. Without --megatron only this tool is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.harness import bench_parser, paired_ratios, provenance, spread

from megatron_kd.config import ConfigError
from megatron_kd.data.tokenizer import load_tokenizer, tokenizer_file
from megatron_kd.data.vocabularies.patterns import PATTERNS
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.storage.exit_codes import BAD_INPUT

FOLDER = Path(__file__).resolve().parent


class ProcessTime(NamedTuple):
    """Hold the seconds of a process on the clock and of CPU, its children included."""

    clock: float
    cpu: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print JSON."""
    arguments = parse_arguments(argv)
    try:
        result = measure(arguments)
    except (ConfigError, OSError) as error:
        print(f"bench_preprocess: {error}", file=sys.stderr)
        return BAD_INPUT
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        write_atomically(arguments.output, (text + "\n").encode())
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options."""
    parser = bench_parser(__doc__, rounds=3, rounds_help="rounds (%(default)s)")
    add = parser.add_argument
    add("--megatron", type=Path, metavar="DIR", help="a checkout of Megatron-LM")
    add("--input", required=True, type=Path, metavar="FILE", help="one .jsonl file with a text key")
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="SentencePiece .model, a tokenizer.json or its folder, or .tiktoken",
    )
    add("--workers", type=int, default=2, help="processes (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1 or arguments.rounds < 1:
        parser.error("--workers and --rounds must be at least 1")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both tools in turn and compare their files.

    Raises:
        ConfigError: One of the tools fails, or cannot read the tokenizer.
    """
    project: list[ProcessTime] = []
    megatron: list[ProcessTime] = []
    equal = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            project.append(_time(project_command(arguments, folder), FOLDER.parent))
            if arguments.megatron is None:
                continue
            command = megatron_command(arguments, folder)
            megatron.append(_time(command, arguments.megatron.absolute()))
            equal += [
                (folder / f"own.{ending}").read_bytes()
                == (folder / f"megatron_text_document.{ending}").read_bytes()
                for ending in ("bin", "idx")
            ]
    megabytes = arguments.input.stat().st_size / 1e6
    result: dict[str, Any] = {
        "command": " ".join(["python tools/bench_preprocess.py", *sys.argv[1:]]),
        "input_megabytes": round(megabytes, 1),
        "workers": arguments.workers,
        "rounds": arguments.rounds,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        **provenance("megatron-core", "sentencepiece", "tokenizers", "numpy"),
        "seconds": _spread([times.clock for times in project]),
        "cpu_seconds": _spread([times.cpu for times in project]),
        "megabytes_per_second": round(megabytes / median(times.clock for times in project), 2),
    }
    if megatron:
        result |= _comparison(project, megatron) | {"same_bytes": all(equal)}
    return result


def _comparison(project: Sequence[ProcessTime], megatron: Sequence[ProcessTime]) -> dict[str, Any]:
    clock = [[times.clock for times in tool] for tool in (megatron, project)]
    cpu = [[times.cpu for times in tool] for tool in (megatron, project)]
    return {
        "megatron_seconds": _spread(clock[0]),
        "megatron_cpu_seconds": _spread(cpu[0]),
        "times_as_fast": _spread(paired_ratios(*clock)),
        "times_less_cpu": _spread(paired_ratios(*cpu)),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in spread(values).items()}


def _time(command: list[str], checkout: Path) -> ProcessTime:
    """Run a command with a checkout on its path; ConfigError with its last line if it fails."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{Path(command[1])} ended with {process.returncode}: {reason}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return ProcessTime(seconds, cpu)


def project_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command of this project's tool."""
    return [
        *(sys.executable, str(FOLDER / "preprocess_data.py")),
        *("--input", str(arguments.input)),
        *("--tokenizer", arguments.tokenizer),
        *("--output", str(folder / "own")),
        *("--workers", str(arguments.workers)),
    ]


def megatron_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command of Megatron-LM's tool on the same input.

    Raises:
        ConfigError: There is no such tool, or it cannot use the tokenizer.
    """
    script = arguments.megatron / "tools/preprocess_data.py"
    if not script.is_file():
        raise ConfigError(f"{script} does not exist: give --megatron a checkout of Megatron-LM")
    vocabulary, _ = load_tokenizer(arguments.tokenizer)
    if vocabulary.kind == "sentencepiece":
        kind, model = "SentencePieceTokenizer", tokenizer_file(arguments.tokenizer)
    else:
        kind, model = "HuggingFaceTokenizer", _huggingface_folder(arguments, folder)
    return [
        *(sys.executable, str(script)),
        *("--input", str(arguments.input)),
        *("--output-prefix", str(folder / "megatron")),
        *("--tokenizer-type", kind),
        *("--tokenizer-model", str(model)),
        *("--workers", str(arguments.workers)),
        "--append-eod",
    ]


def _huggingface_folder(arguments: argparse.Namespace, folder: Path) -> Path:
    """Write a tokenizer as a folder that transformers reads."""
    vocabulary, info = load_tokenizer(arguments.tokenizer)
    source = tokenizer_file(arguments.tokenizer)
    if info.end_of_document is None:
        raise ConfigError(
            f"{source} names no token that ends documents, which Megatron-LM's tool needs"
        )
    end = vocabulary.tokens[info.end_of_document].decode("utf-8")
    model = folder / "tokenizer"
    model.mkdir()
    if vocabulary.kind == "tiktoken":
        # The same ranks and pattern: Megatron-LM's own tiktoken format numbers ids differently.
        from transformers.convert_slow_tokenizer import TikTokenConverter

        converter = TikTokenConverter(
            vocab_file=str(source),
            pattern=PATTERNS.get(vocabulary.pattern or "", vocabulary.pattern),
            extra_special_tokens=[end],
        )
        converter.converted().save(str(model / "tokenizer.json"))
    else:
        shutil.copy(source, model / "tokenizer.json")
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    )
    return model


if __name__ == "__main__":
    sys.exit(main())
