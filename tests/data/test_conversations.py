"""Test that conversations are packed whole and that the loss counts on the answers alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kd.config import ConfigError, load_config
from megatron_kd.data.dataset import DatasetRequest, build_dataset
from megatron_kd.data.preparation.jobs import pieces
from megatron_kd.data.preparation.jobs.conversations import (
    ChatTemplate,
    ConversationEncoder,
    ConversationError,
    MessageKeys,
    parse_messages,
)
from megatron_kd.data.preparation.jobs.packing import Packer
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import COUNTS_FOR_LOSS, STARTS_DOCUMENT, read_index, read_roles
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.train.startup.input_checks import check_inputs
from tests.data.preprocessing import cut_pieces
from tests.helpers.text import END, ROOT, load_tool, make_tokenizers
from tests.losses.cases import fresh_seed

tool = load_tool("preprocess_instructions")
merge_data = load_tool("merge_data")
CHATML = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
PLAIN = (ROOT / "examples/instructions/plain.jinja").read_text()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def chat(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[turn % 2], "content": content}
        for turn, content in enumerate(contents)
    ]


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "tiktoken"])
@pytest.mark.parametrize("source", [CHATML, PLAIN], ids=["chatml", "plain"])
def test_the_loss_counts_on_what_the_assistant_says(
    kind: str, source: str, tokenizers: dict[str, Path]
) -> None:
    vocabulary, info = load_tokenizer(tokenizers[kind])
    template, end = ChatTemplate(source, vocabulary), info.end_of_document
    assert end is not None
    encoder = ConversationEncoder(vocabulary, template)
    messages = chat("How many?", "Four of them.", "And  now?\n", " Five, naïvely.")
    ids, roles = encoder.encode(messages)
    assert roles[0] & STARTS_DOCUMENT
    assert not (roles[1:] & STARTS_DOCUMENT).any()
    # No label is the first token of a conversation, even one that begins with the assistant.
    opening = [{"role": "assistant", "content": "Well?"}, *messages]
    first = ConversationEncoder(vocabulary, ChatTemplate(PLAIN, vocabulary)).encode(opening)[1]
    assert first[0] == STARTS_DOCUMENT
    assert first[1] == COUNTS_FOR_LOSS
    # The runs of tokens that count are the answers and the end-of-document ids after them.
    counts = roles & COUNTS_FOR_LOSS != 0
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(counts.astype(int))) + 1)

    def text_of(part: np.ndarray) -> str:
        """Decode without the library's rules for leading spaces."""
        return b"".join(vocabulary.tokens[index] for index in part if index != end).decode()

    answers = [text_of(ids[run]) for run in runs if counts[run[0]]]
    assert [text.strip("\n") for text in answers] == ["Four of them.", " Five, naïvely."]
    assert sum(ids[counts] == end) == 2
    rendered = template.render(messages, prompt=False).replace(vocabulary.tokens[end].decode(), "")
    assert text_of(ids) == (" " if vocabulary.adds_leading_space else "") + rendered


def test_unusable_conversations_are_reported(tokenizers: dict[str, Path]) -> None:
    vocabulary, _ = load_tokenizer(tokenizers["huggingface"])
    for record, reason in (
        ({"text": "x"}, "no key 'messages'"),
        ({"messages": []}, "not a list"),
        ({"messages": [{"role": "user"}]}, "not a list"),
        ({"messages": chat("only a question")}, "the assistant says nothing"),
        ({"prompt": "a", "response": " "}, "says nothing"),
    ):
        with pytest.raises(ConversationError, match=reason):
            parse_messages(record, MessageKeys())
    with pytest.raises(ConversationError, match="spells the special token"):
        ConversationEncoder(vocabulary, ChatTemplate(PLAIN, vocabulary)).encode(
            chat("<|endoftext|>", "no")
        )
    shifting = (
        "{% for m in messages %}{% if loop.last %}{{ m.content }}{% else %}...{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(ConversationError, match="writes earlier messages differently"):
        ConversationEncoder(vocabulary, ChatTemplate(shifting, vocabulary)).encode(
            chat("one", "two")
        )
    with pytest.raises(ConversationError, match="the template refuses it: no"):
        ConversationEncoder(
            vocabulary, ChatTemplate("{{ raise_exception('no') }}", vocabulary)
        ).encode(chat("one", "two"))
    with pytest.raises(ConfigError, match="not valid jinja"):
        ChatTemplate("{% for %}", vocabulary)


def test_packing_keeps_conversations_whole() -> None:
    rng = random.Random(fresh_seed())
    packer = Packer(50, 0, np.dtype("<u2"), open_samples=4)
    conversations = [np.full(rng.randint(1, 50), number, "<u2") for number in range(1, 300)]
    packed = []
    for ids in conversations:
        roles = np.full(len(ids), COUNTS_FOR_LOSS, np.uint8)
        roles[0] |= STARTS_DOCUMENT
        packed.append(packer.add(ids, roles))
    samples = [sample for sample in [*packed, *packer.finish()] if sample is not None]
    assert all(len(sample.ids) == len(sample.roles) == 50 for sample in samples)
    assert sum(sample.conversations for sample in samples) == 299
    lengths: dict[int, int] = {}
    for sample in samples:
        starts = np.flatnonzero(sample.roles & STARTS_DOCUMENT)
        for start, end in zip(starts, [*starts[1:], 50], strict=True):
            (number,) = set(sample.ids[start:end].tolist())
            assert number == 0 or number not in lengths
            lengths[number] = int(end - start)
            assert bool(sample.roles[end - 1] & COUNTS_FOR_LOSS) == (number != 0)
    assert all(lengths[number] == len(ids) for number, ids in enumerate(conversations, start=1))
    assert len(samples) < 1.25 * sum(map(len, conversations)) / 50


def test_the_tool_writes_packed_samples_that_a_run_accepts(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    rows = [
        {"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."}
        for a in range(12)
        for b in range(12)
    ]
    lines = [json.dumps(row) for row in rows]
    lines[5:5] = ["not json", json.dumps({"question": "long", "answer": "word " * 500})]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    command = [
        "--input",
        str(tmp_path / "sums.jsonl"),
        "--prompt-key",
        "question",
        "--response-key",
        "answer",
        "--sequence-length",
        "64",
    ]
    command += [
        "--tokenizer",
        str(tokenizers["sentencepiece"]),
        "--output",
        str(tmp_path / "data/sums"),
        "--holdout",
        "sums_valid=0.2",
    ]
    command += ["--workers", "1"]
    assert tool.main(command) == 2
    assert "has no chat template" in capsys.readouterr().err
    command += ["--template", str(ROOT / "examples/instructions/plain.jinja")]
    assert tool.main(command) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["unreadable"] == summary["too_long"] == 1
    assert "2 conversations were left out" in captured.err
    assert [text.split(": ")[0].rpartition(":")[2] for text in summary["unreadable_documents"]] == [
        "6",
        "7",
    ]
    assert sum(output["conversations"] for output in summary["outputs"].values()) == 144
    vocabulary, info = load_tokenizer(tokenizers["sentencepiece"])
    answers_read = []
    for prefix in (tmp_path / "data/sums", tmp_path / "data/sums_valid"):
        index, roles = read_index(prefix), read_roles(prefix)
        ids = np.fromfile(f"{prefix}.bin", "<u2")
        assert roles is not None
        assert set(index.lengths) == {64}
        assert len(roles) == len(ids)
        answers = np.split(
            ids[roles & COUNTS_FOR_LOSS != 0],
            np.flatnonzero(ids[roles & COUNTS_FOR_LOSS != 0] == info.end_of_document) + 1,
        )
        answers_read += [
            vocabulary.decode(answer[:-1].tolist()) for answer in answers if len(answer)
        ]
    assert sorted(answers_read) == sorted(row["answer"] for row in rows)
    strict = [*command, "--output", str(tmp_path / "strict/sums"), "--strict"]
    assert tool.main(strict) == 2
    assert "sums.jsonl:6 cannot be used" in capsys.readouterr().err
    assert tool.main(command) == 0
    assert json.loads(capsys.readouterr().out)["kept"] is True
    assert tool.main([*command, "--sequence-length", "32"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    overrides = [
        "--data.tokenizer",
        str(tokenizers["sentencepiece"]),
        "--data.train",
        json.dumps([str(tmp_path / "data/sums")]),
    ]
    overrides += [
        "--data.train_weights",
        "[1.0]",
        "--data.valid",
        json.dumps({"sums": str(tmp_path / "data/sums_valid")}),
    ]
    overrides += [
        "--checkpoint.initialize_from",
        "null",
        "--run.directory",
        str(tmp_path / "run"),
        "--batch.sequence_length",
    ]
    run_file = ["--config", str(ROOT / "examples/instructions/finetune.toml")]
    with pytest.raises(ConfigError, match="packed into samples of 64 tokens"):
        check_inputs(load_config([*run_file, *overrides, "32"]), world_size=2)
    with pytest.raises(ConfigError, match='set data.document_attention = "within"'):
        check_inputs(
            load_config([*run_file, *overrides, "64", "--data.document_attention", "across"]),
            world_size=2,
        )
    assert (
        check_inputs(load_config([*run_file, *overrides, "64"]), world_size=2).vocab_size
        == info.vocab_size
    )
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        check_inputs(
            load_config([*run_file, *overrides, "64", "--data.end_of_document", "a"]), world_size=2
        )


def write_chats(path: Path, count: int, rng: random.Random) -> list[str]:
    rows = [
        (
            f"{n}?",
            " ".join(rng.choice(["yes", "no", "naïve", "7"]) for _ in range(rng.randint(1, 10))),
        )
        for n in range(count)
    ]
    path.write_text(
        "".join(json.dumps({"prompt": ask, "response": say}) + "\n" for ask, say in rows)
    )
    return [say for _, say in rows]


def contents(folder: Path, names: tuple[str, ...] = ("chats", "valid")) -> dict[str, bytes]:
    return {
        f"{name}{end}": (folder / f"{name}{end}").read_bytes()
        for name in names
        for end in (".bin", ".idx", ".roles", ".json")
    }


def test_packing_depends_only_on_the_input(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Compare one piece with many, one process with two, and an interrupted job."""
    write_chats(tmp_path / "a.jsonl", 300, random.Random(fresh_seed()))
    command = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--sequence-length",
        "64",
        "--tokenizer",
        str(tokenizers["tiktoken"]),
        "--holdout",
    ]
    command += [
        "valid=0.3",
        "--template",
        str(ROOT / "examples/instructions/plain.jinja"),
        "--workers",
    ]
    assert tool.main([*command, "1", "--output", str(tmp_path / "one/chats")]) == 0
    cut_pieces(monkeypatch, 3001)
    capsys.readouterr()
    real, calls = pieces.write_atomically, []

    def interrupted(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(pieces, "write_atomically", interrupted)
    assert tool.main([*command, "1", "--output", str(tmp_path / "cut/chats")]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not list((tmp_path / "cut").glob("*.bin"))
    assert tool.main([*command, "2", "--output", str(tmp_path / "cut/chats")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["pieces"] > 5
    assert summary["kept_pieces"] == 2
    one, cut = contents(tmp_path / "one"), contents(tmp_path / "cut")
    for name in one:
        contents_of_both = [
            json.dumps(json.loads(files[name]) | {"made_from": ""})
            if name.endswith("json")
            else files[name]
            for files in (one, cut)
        ]
        assert contents_of_both[0] == contents_of_both[1], name
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(cut)


def test_a_pass_reads_every_packed_sample(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """The last sample, or an only one, is read too.

    The labels that count are all answers, once.
    """
    answers = write_chats(tmp_path / "a.jsonl", 60, random.Random(fresh_seed()))
    vocabulary, info = load_tokenizer(tokenizers["tiktoken"])
    command = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        str(tokenizers["tiktoken"]),
        "--workers",
        "1",
    ]
    command += ["--template", str(ROOT / "examples/instructions/plain.jinja")]
    for length in (64, 8192):
        prefix = tmp_path / f"data{length}/chats"
        assert tool.main([*command, "--sequence-length", str(length), "--output", str(prefix)]) == 0
        settings: dict[str, Any] = dict(
            sequence_length=length, seed=3, index_cache=tmp_path / "cache", within_documents=True
        )
        settings |= dict(end_of_document=info.end_of_document, vocab_size=info.vocab_size)
        samples = len(read_index(prefix).lengths)
        assert samples == 1 if length == 8192 else samples > 5
        dataset = build_dataset(
            DatasetRequest(prefixes=[str(prefix)], num_samples=10**6, repeat=False, **settings)
        )
        assert len(dataset) == samples
        for ordered in (
            dataset,
            build_dataset(DatasetRequest(prefixes=[str(prefix)], num_samples=samples, **settings)),
        ):
            labels, tokens = [], np.memmap(f"{prefix}.bin", "<u2").reshape(-1, length)
            for sample in range(samples):
                values = ordered[sample]
                assert any(np.array_equal(values["tokens"], one) for one in tokens)
                assert np.array_equal(values["labels"][:-1], values["tokens"][1:])
                assert values["loss_mask"][-1] == 0
                labels += values["labels"][values["loss_mask"] > 0].tolist()
            text = b"".join(vocabulary.tokens[index] for index in labels).decode()
            assert sorted(text.split(END)[:-1]) == sorted(answers)


def test_packed_files_without_their_roles_are_refused(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    write_chats(tmp_path / "a.jsonl", 40, random.Random(fresh_seed()))
    command = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--sequence-length",
        "64",
        "--tokenizer",
        str(tokenizers["tiktoken"]),
        "--workers",
    ]
    command += ["1", "--template", str(ROOT / "examples/instructions/plain.jinja"), "--output"]
    parts = [tmp_path / "one", tmp_path / "two"]
    for part in parts:
        assert tool.main([*command, str(part)]) == 0
    assert merge_data.main([*map(str, parts), "--output", str(tmp_path / "both")]) == 0
    both, one = contents(tmp_path, ("both",)), contents(tmp_path, ("one",))
    assert both["both.roles"] == 2 * one["one.roles"]
    assert both["both.bin"] == 2 * one["one.bin"]
    merged, part = json.loads(both["both.json"]), json.loads(one["one.json"])
    assert merged["packed_length"] == 64
    assert merged["loss_tokens"] == 2 * part["loss_tokens"]
    assert merged["conversations"] == 80
    (tmp_path / "two.roles").unlink()
    with pytest.raises(ConfigError, match="two.roles is missing"):
        check_token_file(tmp_path / "two", vocab_size=1000)
    assert merge_data.main([*map(str, parts), "--output", str(tmp_path / "bad")]) == 2
    assert not list(tmp_path.glob("bad*"))
