"""Time preprocess_data.py beside Megatron-LM's own tools/preprocess_data.py: same text, tokenizer and workers, and compare the bytes.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM
    python tools/bench_preprocess.py --megatron Megatron-LM --input text.jsonl --tokenizer tokenizer.model --workers 2 --rounds 5

Whole processes are timed, start-up included, in turns; the ratio is formed within each turn. Megatron-LM's tool reads SentencePiece
models and Hugging Face tokenizers, into which a .tiktoken file is turned for it (not timed); its own requirements (six, transformers)
must be installed. Without --megatron only this tool is timed.
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
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.data.tokenizer import load_tokenizer, tokenizer_file
from megatron_kd.data.vocabularies.patterns import PATTERNS
from megatron_kd.storage.atomic_files import write_atomically

HERE = Path(__file__).resolve().parent


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    add("--rounds", type=int, default=3, help="turns (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the result as JSON")
    parsed = parser.parse_args(arguments)
    if parsed.workers < 1 or parsed.rounds < 1:
        parser.error("--workers and --rounds must be at least 1")
    return parsed


def megatron_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Megatron-LM's tool on the same input; what it does not read as it is becomes a folder that transformers reads."""
    vocabulary, info = load_tokenizer(arguments.tokenizer)
    model = tokenizer_file(arguments.tokenizer)
    kind = "SentencePieceTokenizer"
    if vocabulary.kind != "sentencepiece":
        if info.end_of_document is None:
            raise ConfigError(
                f"{model} names no token that ends documents, which Megatron-LM's tool needs"
            )
        kind, given = "HuggingFaceTokenizer", model
        end = vocabulary.tokens[info.end_of_document].decode("utf-8")
        model = folder / "tokenizer"
        model.mkdir()
        if vocabulary.kind == "tiktoken":
            # The same ranks and the same cuts: Megatron-LM's own tiktoken format numbers ids otherwise.
            from transformers.convert_slow_tokenizer import TikTokenConverter

            converter = TikTokenConverter(
                vocab_file=str(given),
                pattern=PATTERNS.get(vocabulary.pattern or "", vocabulary.pattern),
                extra_special_tokens=[end],
            )
            converter.converted().save(str(model / "tokenizer.json"))
        else:
            shutil.copy(given, model / "tokenizer.json")
        (model / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
        )
    script = arguments.megatron / "tools/preprocess_data.py"
    if not script.is_file():
        raise ConfigError(f"{script} does not exist: give --megatron a checkout of Megatron-LM")
    command = [
        sys.executable,
        str(script),
        "--input",
        str(arguments.input),
        "--output-prefix",
        str(folder / "megatron"),
    ]
    return [
        *command,
        "--tokenizer-type",
        kind,
        "--tokenizer-model",
        str(model),
        "--workers",
        str(arguments.workers),
        "--append-eod",
    ]


def own_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    command = [
        sys.executable,
        str(HERE / "preprocess_data.py"),
        "--input",
        str(arguments.input),
        "--tokenizer",
        arguments.tokenizer,
    ]
    return [*command, "--output", str(folder / "own"), "--workers", str(arguments.workers)]


def timed(command: list[str], path: Path) -> tuple[float, float]:
    """Seconds on the clock and of CPU, children included. ConfigError with its last line where the command fails."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{Path(command[1])} ended with {done.returncode}: {reason}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 3),
        "smallest": round(min(values), 3),
        "largest": round(max(values), 3),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    own: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    same = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            own.append(timed(own_command(arguments, folder), HERE.parent))
            if arguments.megatron is None:
                continue
            theirs.append(timed(megatron_command(arguments, folder), arguments.megatron.absolute()))
            pairs = (
                (folder / f"own.{kind}", folder / f"megatron_text_document.{kind}")
                for kind in ("bin", "idx")
            )
            same.append(all(one.read_bytes() == other.read_bytes() for one, other in pairs))
    megabytes = arguments.input.stat().st_size / 1e6
    result: dict[str, Any] = {
        "command": " ".join(["python tools/bench_preprocess.py", *sys.argv[1:]]), "input_megabytes": round(megabytes, 1),
        "workers": arguments.workers, "rounds": arguments.rounds, "cores": os.cpu_count(), "machine": platform.machine(),
        "versions": {name: version(name) for name in ("megatron-core", "sentencepiece", "tokenizers", "numpy")},
        "seconds": spread([seconds for seconds, _ in own]), "cpu_seconds": spread([cpu for _, cpu in own]),
        "megabytes_per_second": round(megabytes / median([seconds for seconds, _ in own]), 2),
    }  # fmt: skip
    if theirs:
        result |= {
            "megatron_seconds": spread([seconds for seconds, _ in theirs]), "megatron_cpu_seconds": spread([cpu for _, cpu in theirs]),
            "times_as_fast": spread([other / mine for (mine, _), (other, _) in zip(own, theirs, strict=True)]),
            "times_less_cpu": spread([other / mine for (_, mine), (_, other) in zip(own, theirs, strict=True)]),
            "same_bytes": all(same),
        }  # fmt: skip
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        result = run(parsed)
    except (ConfigError, OSError) as error:
        print(f"bench_preprocess: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=2)
    print(text)
    if parsed.output:
        write_atomically(parsed.output, (text + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
