"""Preprocessing writes Megatron's bytes, whatever the tokenizer, the files, the number of workers, and however often it is killed."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_kd.data.preparation import fast_encoding as encode_module
from megatron_kd.data.preparation import preprocess
from megatron_kd.data.preparation.documents import make_pieces
from megatron_kd.data.preparation.fast_encoding import Encoder
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.tokenizer import load_tokenizer
from tests.helpers.text import (
    ROOT,
    awkward_text,
    load_tool,
    make_tokenizers,
    plain_encoder,
    same_tokens,
    source_texts,
    write_as_megatron,
)
from tests.losses.cases import fresh_seed

tool = load_tool("preprocess_data")
KINDS = ("sentencepiece", "unigram", "huggingface", "tiktoken")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(fresh_seed())
    found = [awkward_text(rng, rng.randint(0, 60)) for _ in range(300)] + source_texts(100_000)
    rng.shuffle(found)
    return [*found, "", " ", "\n"]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def call(source: Path | str, tokenizer: Path, output: Path, *more: str) -> dict[str, Any]:
    """The tool's summary; it must end well."""
    command = [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--input",
        str(source),
        "--tokenizer",
        str(tokenizer),
    ]
    done = subprocess.run(
        [*command, "--output", str(output), *more],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def here(source: Path | str, tokenizer: Path, output: Path, *more: str) -> int:
    """The tool's exit code, in this process."""
    arguments = [
        "--input",
        str(source),
        "--tokenizer",
        str(tokenizer),
        "--output",
        str(output),
        "--workers",
        "1",
        *more,
    ]
    return int(tool.main(arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_by_words_is_encoding_whole_documents(
    kind: str, tokenizers: dict[str, Path], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, _ = load_tokenizer(tokenizers[kind])
    plain, _ = plain_encoder(kind, tokenizers[kind])
    assert vocabulary.splits_at_spaces == (kind != "unigram")
    rng = random.Random(fresh_seed())
    some = [*texts, "a\u2581 b \u2581\u2581 c", *(awkward_text(rng, 200) for _ in range(50))]
    expected = [vocabulary._array(plain(text)) for text in some]
    assert Encoder(vocabulary).encode(some) == expected
    # A document longer than a slice, and a memory too small for the words.
    monkeypatch.setattr(encode_module, "_SLICE", 300)
    monkeypatch.setattr(encode_module, "_WORDS_KEPT", 50)
    assert Encoder(vocabulary).encode(some) == expected
    # Unknown rules: cuts that are checked.
    vocabulary.splits_at_spaces = vocabulary.caches_words = False
    monkeypatch.setattr(encode_module, "_WINDOW", 100)
    assert Encoder(vocabulary).encode(some) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_megatrons_bytes(
    kind: str, tokenizers: dict[str, Path], texts: list[str], tmp_path: Path, capsys: Any
) -> None:
    plain, end = plain_encoder(kind, tokenizers[kind])
    vocabulary, info = load_tokenizer(tokenizers[kind])
    assert info.end_of_document == end
    source = write_lines(tmp_path / "text.jsonl", texts)
    for name, more, last in (("ended", [], end), ("bare", ["--no-append-eod"], None)):
        write_as_megatron(tmp_path / f"megatron_{name}", texts, plain, last, info.vocab_size)
        assert here(source, tokenizers[kind], tmp_path / name, *more) == 0
        summary = json.loads(capsys.readouterr().out)
        assert same_tokens(tmp_path / name, tmp_path / f"megatron_{name}")
        assert summary["empty"] == sum(not plain(text) for text in texts)
        assert summary["unreadable"] == 0
    found = check_token_file(
        tmp_path / "ended", vocab_size=info.vocab_size, tokenizer_digest=info.digest
    )
    assert (
        found.num_tokens
        == summary["outputs"][str(tmp_path / "bare")]["tokens"] + len(texts) - summary["empty"]
    )
    assert not list(tmp_path.glob("*.pieces"))


def test_wide_vocabularies_are_four_bytes(tmp_path: Path, capsys: Any) -> None:
    import base64

    path = tmp_path / "wide.tiktoken"
    ranks = [bytes([byte]) for byte in range(256)] + [
        f" {number:x}".encode() for number in range(70_000)
    ]
    path.write_text(
        "".join(
            f"{base64.b64encode(token).decode()} {rank}\n"
            for rank, token in enumerate(dict.fromkeys(ranks))
        )
    )
    texts = [f"word {number:x} and" for number in range(60_000, 60_100)]
    assert here(write_lines(tmp_path / "a.jsonl", texts), path, tmp_path / "out") == 0
    import numpy as np

    ids = np.fromfile(tmp_path / "out.bin", "<i4")
    vocabulary, info = load_tokenizer(path)
    assert json.loads((tmp_path / "out.json").read_text())["dtype"] == "int32"
    assert ids.max() == info.end_of_document > 65536
    assert vocabulary.decode([index for index in ids if index != info.end_of_document]) == "".join(
        texts
    )


def test_every_kind_of_file_gives_the_same_tokens(
    tokenizers: dict[str, Path], texts: list[str], tmp_path: Path
) -> None:
    kept = [text for text in texts if text.strip("\n")]
    lines = write_lines(tmp_path / "a.jsonl", kept)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(lines.read_bytes())
    pyarrow.parquet.write_table(
        pyarrow.table({"id": list(range(len(kept))), "text": kept}),
        tmp_path / "a.parquet",
        row_group_size=50,
    )
    (tmp_path / "files").mkdir()
    for number, text in enumerate(kept):
        (tmp_path / f"files/{number:04}.txt").write_bytes(text.encode())
    path = tokenizers["huggingface"]
    for name, source in {
        "jsonl": lines, "gz": tmp_path / "gz", "zst": tmp_path / "*.zst", "parquet": tmp_path / "a.parquet", "files": tmp_path / "files"
    }.items():  # fmt: skip
        assert here(source, path, tmp_path / "out" / name) == 0
        assert same_tokens(tmp_path / "out/jsonl", tmp_path / "out" / name), name


def test_how_files_are_cut_changes_nothing(
    tokenizers: dict[str, Path], texts: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Lines by bytes and row groups by number, in one piece and in many: the same tokens, and the same documents held out."""
    write_lines(tmp_path / "a.jsonl", texts)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=20
    )
    for name in ("a.jsonl", "a.parquet"):
        for cut, size in (("whole", 10**9), ("cut", 3000)):
            monkeypatch.setattr(
                preprocess,
                "make_pieces",
                lambda files, format, _, size=size: make_pieces(files, format, size),
            )
            plan = preprocess.make_plan(
                [str(tmp_path / name)], tmp_path / "plan", str(tokenizers["tiktoken"])
            )
            assert len(plan.pieces) == 1 if cut == "whole" else len(plan.pieces) > 5
            output = tmp_path / name.replace(".", "_") / cut / "train"
            assert (
                here(tmp_path / name, tokenizers["tiktoken"], output, "--holdout", "valid=0.3") == 0
            )
        folder = tmp_path / name.replace(".", "_")
        assert all(
            same_tokens(folder / "whole" / split, folder / "cut" / split)
            for split in ("train", "valid")
        )


def test_broken_input_is_counted_with_its_lines(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    rows = [json.dumps({"text": f"row {number}"}).encode() for number in range(200)]
    bad = {
        7: b"{not json",
        40: b'{"other": 1}',
        120: b'{"text": "caf\xe9"}',
        121: b'{"text": 5}',
        150: b'{"text": "\\ud800"}',
        199: rows[3][:-4],
    }
    good = [json.loads(row)["text"] for number, row in enumerate(rows) if number not in bad]
    (tmp_path / "rows.jsonl").write_bytes(
        b"\n".join(bad.get(number, row) for number, row in enumerate(rows))
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows[0] * 9)[:-9])
    monkeypatch.setattr(
        preprocess, "make_pieces", lambda files, format, size: make_pieces(files, format, 501)
    )
    path = tokenizers["tiktoken"]
    assert here(tmp_path / "rows.jsonl", path, tmp_path / "out") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["pieces"] > 5
    assert summary["unreadable"] == len(bad)
    lines = [
        int(text.split("rows.jsonl:")[1].split(":")[0]) for text in summary["unreadable_documents"]
    ]
    assert lines == [number + 1 for number in bad]
    reasons = (
        "not JSON",
        "no key 'text'",
        "not UTF-8",
        "'text' is not a string",
        "half of a surrogate",
        "not JSON",
    )
    assert all(
        reason in text
        for reason, text in zip(reasons, summary["unreadable_documents"], strict=True)
    )
    assert "6 documents were left out" in captured.err
    assert captured.err.count("\n") == 1
    plain, end = plain_encoder("tiktoken", path)
    write_as_megatron(tmp_path / "megatron", good, plain, end, 1000)
    assert same_tokens(tmp_path / "out", tmp_path / "megatron")
    for source, line in (
        ("rows.jsonl", "rows.jsonl:8 "),
        ("latin.txt", "latin.txt "),
        ("cut.jsonl.gz", "cut.jsonl.gz:2 "),
    ):
        if source == "cut.jsonl.gz":
            (tmp_path / source).write_bytes(
                gzip.compress(rows[0] + b"\n" + os.urandom(1 << 17).hex().encode())[:-70_000]
            )
        assert here(tmp_path / source, path, tmp_path / "strict", "--strict") == 2
        assert f"{line}cannot be used" in capsys.readouterr().err
        assert not list(tmp_path.glob("strict.[bij]*"))
    # A line far inside a file, found by a piece that begins after it.
    (tmp_path / "late.jsonl").write_bytes(b"\n".join([*rows[:150], b"[]", *rows[150:]]))
    assert here(tmp_path / "late.jsonl", path, tmp_path / "strict", "--strict") == 2
    assert "late.jsonl:151 cannot be used (no JSON object)" in capsys.readouterr().err


def test_a_killed_run_goes_on_to_the_same_bytes(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    rng = random.Random(fresh_seed())
    source = write_lines(tmp_path / "a.jsonl", [awkward_text(rng, 200) for _ in range(3000)])
    path = tokenizers["unigram"]
    whole = call(source, path, tmp_path / "whole", "--workers", "2", "--holdout", "valid=0.2")
    for name in ("whole", "valid"):
        for ending in (".bin", ".idx"):
            os.rename(tmp_path / f"{name}{ending}", tmp_path / f"expected_{name}{ending}")
    command = [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--input",
        str(source),
        "--tokenizer",
        str(path),
    ]
    command += ["--workers", "2", "--output", str(tmp_path / "whole"), "--holdout", "valid=0.2"]
    for _ in range(2):
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(1.0, 1.5 + whole["seconds"]))
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        assert (
            not killed or not list(tmp_path.glob("whole.idx")) or list(tmp_path.glob("whole.bin"))
        )
    summary = call(source, path, tmp_path / "whole", "--workers", "2", "--holdout", "valid=0.2")
    assert same_tokens(tmp_path / "whole", tmp_path / "expected_whole")
    assert same_tokens(tmp_path / "valid", tmp_path / "expected_valid")
    assert summary["outputs"] == whole["outputs"]
    assert not list(tmp_path.glob("*.pieces"))
    assert not list(tmp_path.glob(".*partial*"))
    assert (
        call(source, path, tmp_path / "whole", "--workers", "2", "--holdout", "valid=0.2")["kept"]
        is True
    )


def test_finished_pieces_of_this_very_job_are_kept(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "files"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(f"document {number} " * 80_000)
    path, output = tokenizers["huggingface"], tmp_path / "out"

    def shard(text: str) -> dict[str, Any]:
        assert here(source, path, output, "--shard", text) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert shard("0/2")["pieces"] == 3
    assert shard("0/2")["kept_pieces"] == 3
    assert not list(tmp_path.glob("out.[bi]*"))
    (source / "2.txt").write_text("changed " * 160_000)  # the same length
    assert shard("0/2")["kept_pieces"] == 2, "a changed input must be read again"
    (next((tmp_path / "out.pieces").glob("*4.0.ids"))).write_bytes(b"cut")
    (tmp_path / "out.pieces/piece-000001.0.ids.partial-99").write_bytes(b"left by a killed run")
    assert here(source, path, output) == 0
    assert json.loads(capsys.readouterr().out)["kept_pieces"] == 2
    plain, end = plain_encoder("huggingface", path)
    write_as_megatron(
        tmp_path / "megatron",
        [file.read_text() for file in sorted(source.iterdir())],
        plain,
        end,
        1000,
    )
    assert same_tokens(output, tmp_path / "megatron")
    # Other settings, another tokenizer or other input never touch what is finished.
    for more in (["--no-append-eod"], ["--exclude", "0.txt"], ["--end-of-document", "a"]):
        assert here(source, path, output, *more) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert same_tokens(output, tmp_path / "megatron")
    assert here(source, path, output, "--exclude", "0.txt", "--overwrite") == 0
    assert not same_tokens(output, tmp_path / "megatron")


def test_a_full_disk_has_its_own_exit_code(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["some words " * 400] * 600)
    command = [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--input",
        str(source),
        "--tokenizer",
        str(tokenizers["huggingface"]),
    ]
    command += ["--output", str(tmp_path / "out/train")]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    done = subprocess.run(
        [*command, "--workers", "2"],
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("preprocess_data: no space is left"), done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.[bi]*"))
    assert not list(tmp_path.rglob("*partial*"))
    call(source, tokenizers["huggingface"], tmp_path / "out/train")
    assert check_token_file(tmp_path / "out/train", vocab_size=1000).num_documents == 600


def test_memory_does_not_grow_with_the_input(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Peak memory of reading 6 and 24 times the same text, compressed into a single file: one piece, read in one go."""
    text = "".join(json.dumps({"text": text}) + "\n" for text in source_texts(1_500_000)).encode()
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory of a process of its own is read from /proc")
    # Not getrusage: its peak includes this process's own, from before the other program took over.
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "import megatron_kd.data.preparation.pieces as pieces; pieces._BATCH_CHARACTERS = 200_000  # its own level is reached sooner\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"
    )
    peaks = []
    for times in (6, 24):
        (tmp_path / f"{times}.jsonl.gz").write_bytes(gzip.compress(text * times, 1))
        command = [
            sys.executable,
            "-c",
            program,
            str(ROOT / "tools/preprocess_data.py"),
            "--input",
            str(tmp_path / f"{times}.jsonl.gz"),
        ]
        command += [
            "--tokenizer",
            str(tokenizers["tiktoken"]),
            "--output",
            str(tmp_path / f"out{times}"),
            "--workers",
            "1",
        ]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stderr.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 12_000, peaks  # KiB; the text itself grows by 27,000


def test_two_runs_on_one_output(tokenizers: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["text"] * 10)
    plan = preprocess.make_plan([str(source)], tmp_path / "out", str(tokenizers["tiktoken"]))
    with preprocess.holding(plan):
        assert here(source, tokenizers["tiktoken"], tmp_path / "out") == 2
    assert "another process is making" in capsys.readouterr().err
    preprocess.make_share(plan, 0, 1, 1, lambda note, kept: None)
    source.write_text(source.read_text() + "\n")
    with pytest.raises(preprocess.ConfigError, match="a.jsonl changed while it was being read"):
        preprocess.finish(plan)


SBATCH = """#!/bin/sh
# A stand-in for Slurm: runs every array task of the script at once, one after the other, and prints a job id.
for last in "$@"; do :; done
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
for task in $(seq 0 "${tasks:-0}"); do
    export SLURM_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NODEID=0 SLURM_NODELIST=here
    bash "$last" >>"$SBATCH_LOG" 2>&1 || exit 1
done
echo "Submitted batch job 7"
"""


def test_slurm_through_datatrove(
    tokenizers: dict[str, Path], texts: list[str], tmp_path: Path
) -> None:
    """The scripts that datatrove writes are run by a stand-in for sbatch and srun: the same bytes as on one machine."""
    pytest.importorskip("datatrove")
    (tmp_path / "bin").mkdir()
    srun = '#!/bin/sh\n[ "$1 $2 $3" = "-l -n 1" ] && shift 3\nexec "$@"\n'
    for name, script in (
        ("sbatch", SBATCH),
        ("srun", srun),
        ("scontrol", "#!/bin/sh\necho here\n"),
    ):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "text").mkdir()
    for number in range(3):
        write_lines(tmp_path / f"text/{number}.jsonl", texts[number::3] * 9)
    path = tokenizers["huggingface"]
    call(tmp_path / "text", path, tmp_path / "local", "--workers", "1")
    command = [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--input",
        str(tmp_path / "text"),
        "--tokenizer",
        str(path),
    ]
    command += [
        "--output",
        str(tmp_path / "slurm"),
        "--executor",
        "slurm",
        "--slurm-partition",
        "cpu",
        "--tasks",
        "2",
    ]
    env = environment() | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SBATCH_LOG": str(tmp_path / "log"),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert done.returncode == 0, done.stderr + log
    assert same_tokens(tmp_path / "local", tmp_path / "slurm"), done.stderr + log
