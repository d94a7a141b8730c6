"""Test the digests of tokenizers, and the tools that inspect and merge token files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.tokenizer import load_tokenizer
from tests.helpers.text import (
    END,
    awkward_text,
    load_tool,
    plain_encoder,
    same_tokens,
    write_as_megatron,
)
from tests.losses.cases import fresh_seed

inspect_data = load_tool("inspect_data")
merge_data = load_tool("merge_data")


def test_the_digest_is_of_ids_and_bytes_not_of_the_file(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    infos = {kind: load_tokenizer(path)[1] for kind, path in tokenizers.items()}
    assert infos["huggingface"] == infos["tiktoken"], "the same vocabulary in two formats"
    assert len({info.digest for info in infos.values()}) == len(infos) - 1
    # A folder as transformers writes it has the same vocabulary. Another end of document, or a
    # token with another id, changes it.
    content = json.loads(tokenizers["huggingface"].read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END, "chat_template": "{{ messages }}"})
    )
    vocabulary, info = load_tokenizer(tmp_path)
    assert info == infos["huggingface"]
    assert vocabulary.chat_template == "{{ messages }}"
    assert load_tokenizer(tmp_path, end_of_document="a")[1].digest != info.digest
    lines = tokenizers["tiktoken"].read_text().splitlines()
    first, second = lines[300].split()[0], lines[301].split()[0]
    lines[300], lines[301] = f"{second} 300", f"{first} 301"
    (tmp_path / "swapped.tiktoken").write_text("\n".join(lines))
    swapped = load_tokenizer(tmp_path / "swapped.tiktoken")[1]
    assert swapped.vocab_size == info.vocab_size
    assert swapped.digest != info.digest


def test_sentencepiece_and_its_hugging_face_form_have_one_digest(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizers["sentencepiece"].read_bytes())
    special = {0, 1, 2}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": proto.pieces[i].piece, "special": True, **flags}
        for i in sorted(special)
    ]
    model = {
        "type": "BPE",
        "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
        "merges": [],
        "byte_fallback": True,
    }
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
        ],
    }
    unset = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
    content = dict.fromkeys(unset) | {
        "version": "1.0",
        "added_tokens": added,
        "decoder": decoder,
        "model": model,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert (
        load_tokenizer(tmp_path / "tokenizer.json")[1]
        == load_tokenizer(tokenizers["sentencepiece"])[1]
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "tiktoken"])
def test_decoding_inverts_encoding(kind: str, tokenizers: dict[str, Path]) -> None:
    vocabulary, info = load_tokenizer(tokenizers[kind])
    rng = random.Random(fresh_seed())
    for _ in range(100):
        text = awkward_text(rng, 30)
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert info.vocab_size == len(vocabulary.tokens)
    assert max(vocabulary.encode("abc déf")) < info.vocab_size


def test_unusable_tokenizers_are_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        "empty.json": b"{}",
        "cut.json": tokenizers["huggingface"].read_bytes()[:500],
        "bad.json": b'{"model": {"type": "Nothing"}}',
        "twice.tiktoken": b"IQ== 0\nIg== 0\n",
        "holes.tiktoken": b"IQ== -1\n",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="is no tokenizer") as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value), name
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        (tmp_path / "folder").mkdir()
        load_tokenizer(tmp_path / "folder")
    with pytest.raises(ConfigError, match="says itself how it cuts text"):
        load_tokenizer(tokenizers["huggingface"], pattern="qwen")
    with pytest.raises(ConfigError, match="the pattern .* cannot be used"):
        load_tokenizer(tokenizers["tiktoken"], pattern="(unclosed")
    assert load_tokenizer(tokenizers["tiktoken"])[0].pattern == "cl100k"
    other = load_tokenizer(tokenizers["tiktoken"], pattern="gpt2")
    assert other[1].digest == load_tokenizer(tokenizers["tiktoken"])[1].digest
    assert other[0].encode("a\nb") is not None


def write(prefix: Path, documents: list[list[int]], digest: str, vocab_size: int) -> str:
    with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
        for ids in documents:
            writer.add(np.array(ids), np.array([len(ids)]))
        writer.commit(
            tokenizer_digest=digest,
            vocab_size=vocab_size,
            end_of_document=700,
            append_eod=True,
            bytes=len(documents),
        )
    return str(prefix)


def test_inspection_counts_shows_and_checks(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    encode, end = plain_encoder("tiktoken", tokenizers["tiktoken"])
    _, info = load_tokenizer(tokenizers["tiktoken"])
    texts = ["first document", "", "word " * 100, *["short"] * 20, "the last one"]
    write_as_megatron(tmp_path / "a", texts, encode, end, info.vocab_size)
    tokenizer = ["--tokenizer", str(tokenizers["tiktoken"])]
    assert (
        inspect_data.main(
            [
                str(tmp_path / "a"),
                *tokenizer,
                "--show",
                "3",
                "--json",
                "--picture",
                str(tmp_path / "a.png"),
            ]
        )
        == 0
    )
    (summary,) = json.loads(capsys.readouterr().out)["files"]
    lengths = [len(encode(text)) + 1 for text in texts if text]
    assert summary["tokens"] == sum(lengths) == summary["bytes"] // 2
    assert summary["documents"] == summary["ended_documents"] == 23
    assert summary["empty_documents"] == 1
    assert summary["length_max"] == max(lengths)
    assert summary["length_p50"] == sorted(lengths)[11]
    assert sum(count for _, _, count in summary["histogram"]) == 23
    assert summary["largest_id"] == end
    assert [shown["document"] for shown in summary["shown"]] == [0, 12, 23]
    assert summary["shown"][0]["text"] == "first document" + END
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert inspect_data.main([str(tmp_path / "a"), *tokenizer, "--show", "1"]) == 0
    assert "documents by length" in (text := capsys.readouterr().out)
    assert "'first document" in text
    assert inspect_data.main([str(tmp_path / "a"), "--vocab-size", str(end)]) == 1
    assert f"token id {end}" in capsys.readouterr().err
    with open(tmp_path / "a.bin", "ab") as stream:
        stream.write(b"xx")
    assert inspect_data.main([str(tmp_path / "a")]) == 1
    assert "oversized" in capsys.readouterr().err


def test_merging_is_writing_one_after_the_other(tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(fresh_seed())
    documents = [
        [[*rng.integers(0, 700, rng.integers(1, 9)).tolist(), 700] for _ in range(12)]
        for _ in range(3)
    ]
    prefixes = [
        write(tmp_path / f"part{number}", part, "ab", 701) for number, part in enumerate(documents)
    ]
    assert merge_data.main([*prefixes, "--output", str(tmp_path / "all")]) == 0
    write(tmp_path / "expected", sum(documents, []), "ab", 701)
    assert same_tokens(tmp_path / "all", tmp_path / "expected")
    assert not list(tmp_path.glob(".*"))
    assert (
        check_token_file(tmp_path / "all", vocab_size=701, tokenizer_digest="ab").num_documents
        == 36
    )
    assert merge_data.main([*prefixes, "--output", str(tmp_path / "all")]) == 2
    assert "there already" in capsys.readouterr().err
    other = write(tmp_path / "other", documents[0], "cd", 701)
    assert merge_data.main([prefixes[0], other, "--output", str(tmp_path / "mixed")]) == 2
    assert "differ in tokenizer_digest" in capsys.readouterr().err
    assert not list(tmp_path.glob("*mixed*"))
