"""Conversations as tokens: a chat template turns messages into text, and the loss counts on what the assistant says.

The text of a conversation is cut where the assistant begins and ends, by rendering it up to there; each part is encoded by itself,
as it is when a model is asked: the prompt first, then what the model writes. So every token belongs to one side, by construction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.token_files import COUNTS_FOR_LOSS, STARTS_DOCUMENT
from megatron_kd.data.vocabularies.base import Vocabulary

Message = dict[str, str]


class BadConversation(ValueError):
    """A conversation that cannot be used; the message says why."""


@dataclass(frozen=True)
class Packed:
    """One sample: ids [S], roles uint8 [S] (see `indexed.read_roles`), and the conversations in it."""

    ids: np.ndarray
    roles: np.ndarray
    conversations: int


class ChatTemplate:
    """A jinja template as transformers has them: `messages`, `add_generation_prompt`, `bos_token`, `eos_token`."""

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        """ConfigError where jinja2 is missing or the source is no template."""
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ConfigError(
                "chat templates need the package jinja2: pip install 'megatron-kd[preprocess]'"
            ) from error
        self._error = TemplateError
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(
                f"the chat template is not valid jinja ({error}): repair it, or name another with --template"
            ) from error
        end = vocabulary.end_of_document
        names = {
            "bos": "<s>" if b"<s>" in vocabulary.tokens else "",
            "eos": vocabulary.tokens[end].decode("utf-8") if end is not None else "",
        }
        self._tokens = {f"{name}_token": value for name, value in names.items()}

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The text of `messages`; prompt: followed by what makes the assistant speak. BadConversation where the template refuses."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=prompt, **self._tokens
            )
        except (
            self._error,
            TypeError,
            KeyError,
            OverflowError,
        ) as error:  # the sandbox bounds ranges
            raise BadConversation(f"the template refuses it: {error}") from error


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def messages_of(
    row: dict[str, Any], *, messages_key: str, prompt_key: str, response_key: str
) -> list[Message]:
    """The messages of one line: a list under `messages_key`, else a prompt and a response. BadConversation for anything else."""
    if messages_key in row:
        found = row[messages_key]
    elif prompt_key in row and response_key in row:
        found = [
            {"role": "user", "content": row[prompt_key]},
            {"role": "assistant", "content": row[response_key]},
        ]
    else:
        raise BadConversation(
            f"no key {messages_key!r}, and not both {prompt_key!r} and {response_key!r}"
        )
    if not (
        isinstance(found, list) and found and all(isinstance(one, dict) for one in found)
    ) or not all(isinstance(one.get(name), str) for one in found for name in ("role", "content")):
        raise BadConversation("its messages are not a list of objects with a role and a content")
    if not any(one["role"] == "assistant" and one["content"].strip() for one in found):
        raise BadConversation("the assistant says nothing in it")
    return found


def segments(messages: Sequence[Message], template: ChatTemplate) -> Iterator[tuple[str, bool]]:
    """(text, whether the assistant says it), in order; together they are the whole rendered conversation."""
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:number], prompt=True)
        after = template.render(messages[: number + 1], prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise BadConversation(
                "its template writes earlier messages differently once later ones are there"
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after
    whole = template.render(messages, prompt=False)
    if not whole.startswith(done):
        raise BadConversation(
            "its template writes earlier messages differently once later ones are there"
        )
    yield whole[len(done) :], False


class ConversationEncoder:
    """Conversations to ids and roles. One per process."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate) -> None:
        self.vocabulary, self.template = vocabulary, template
        self._names = {
            vocabulary.tokens[index].decode("utf-8", "replace"): index
            for index in vocabulary.special
        }
        self._names.pop("", None)
        longest_first = sorted(map(re.escape, self._names), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first)) if longest_first else None

    def encode(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """ids [N] and roles uint8 [N] of one conversation. BadConversation, also where a message spells a special token."""
        for message in messages:
            if self._special is not None and (found := self._special.search(message["content"])):
                raise BadConversation(f"it spells the special token {found.group()!r}")
        ids: list[np.ndarray] = []
        roles: list[np.ndarray] = []
        for text, counts in segments(messages, self.template):
            part = self._ids(text, first=not ids)
            if len(part):
                ids.append(part)
                roles.append(np.full(len(part), COUNTS_FOR_LOSS if counts else 0, dtype=np.uint8))
        joined, own = np.concatenate(ids), np.concatenate(roles)
        # Nothing in a conversation comes before its first token, so nothing there can predict it.
        own[0] = STARTS_DOCUMENT
        return joined, own

    def _ids(self, text: str, *, first: bool) -> np.ndarray:
        """Ids of a part of a conversation; the template's special tokens by name, which not every library finds in text."""
        found: list[bytes] = []
        start = 0
        for match in self._special.finditer(text) if self._special is not None else ():
            found += [self._plain(text[start : match.start()], first and not start)]
            found += [self.vocabulary.dtype.type(self._names[match.group()]).tobytes()]
            start = match.end()
        found.append(self._plain(text[start:], first and not start))
        return np.frombuffer(b"".join(found), self.vocabulary.dtype)

    def _plain(self, text: str, first: bool) -> bytes:
        if not text:
            return b""
        return (
            self.vocabulary.encode_document(text)
            if first
            else self.vocabulary.encode_batch([text])[0]
        )


class Packer:
    """Whole conversations side by side in samples of `length` tokens: each goes where the least room is left over.

    What stays free is filled with `padding`, as a document of its own without loss. At most `open_samples` are under construction.
    """

    def __init__(self, length: int, padding: int, dtype: np.dtype, open_samples: int = 64) -> None:
        self.length, self.padding, self.dtype, self.open_samples = (
            length,
            padding,
            dtype,
            open_samples,
        )
        self._samples: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self._room: list[int] = []

    def add(self, ids: np.ndarray, roles: np.ndarray) -> Packed | None:
        """Take one conversation of at most `length` ids; a sample where one had to be finished to make place."""
        finished = None
        fits = [place for place, free in enumerate(self._room) if free >= len(ids)]
        if fits:
            place = min(fits, key=lambda at: self._room[at])
        else:
            if len(self._samples) == self.open_samples:
                finished = self._close(self._room.index(min(self._room)))
            self._samples.append([])
            self._room.append(self.length)
            place = len(self._samples) - 1
        self._samples[place].append((ids, roles))
        self._room[place] -= len(ids)
        return finished

    def finish(self) -> Iterator[Packed]:
        """The samples that are left."""
        while self._samples:
            yield self._close(0)

    def _close(self, place: int) -> Packed:
        parts, free = self._samples.pop(place), self._room.pop(place)
        ids, roles = (
            np.full(self.length, self.padding, self.dtype),
            np.zeros(self.length, dtype=np.uint8),
        )
        used = self.length - free
        ids[:used] = np.concatenate([ids for ids, _ in parts])
        roles[:used] = np.concatenate([roles for _, roles in parts])
        if free:
            roles[used] |= STARTS_DOCUMENT
        return Packed(ids, roles, len(parts))
