"""Test that conversations are packed whole and that the loss counts on the answers alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.jobs.conversations import (
    ChatTemplate,
    ConversationEncoder,
    ConversationError,
    MessageKeys,
    parse_messages,
)
from megatron_kd.data.preparation.jobs.sample_packing import Packer
from megatron_kd.data.token_files import COUNTS_FOR_LOSS, STARTS_DOCUMENT
from megatron_kd.data.tokenizer import load_tokenizer
from tests.helpers.text import ROOT, load_tool
from tests.losses.cases import fresh_seed

tool = load_tool("preprocess_instructions")
merge_data = load_tool("merge_data")
CHATML = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
PLAIN = (ROOT / "examples/instructions/plain.jinja").read_text()


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
