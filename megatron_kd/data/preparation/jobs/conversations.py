"""Encode conversations with a chat template, so that the loss counts on the assistant's text.

The text of a conversation is cut where the assistant begins and ends, by rendering it up to there.
Each part is encoded by itself, as it is at inference: the prompt first, then what the model writes.
Every token therefore belongs to one side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.token_files import COUNTS_FOR_LOSS, STARTS_DOCUMENT
from megatron_kd.data.vocabularies.vocabulary import Vocabulary

Message = dict[str, str]

_REWRITES_HISTORY = "its template writes earlier messages differently once later ones are there"


class ConversationError(ValueError):
    """Report a conversation that cannot be used, with the reason."""


@dataclass(frozen=True)
class MessageKeys:
    """Name the keys of a conversation in a line of JSON.

    Attributes:
        messages: key of a list of messages.
        prompt: key of the prompt, in lines without messages.
        response: key of the response, in lines without messages.
    """

    messages: str = "messages"
    prompt: str = "prompt"
    response: str = "response"


class ChatTemplate:
    """Render messages with a jinja template.

    The variables are those of transformers: `messages`, `add_generation_prompt`, `bos_token`,
    `eos_token`.
    """

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        """Compile the template.

        Raises:
            ConfigError: jinja2 is missing, or the source is no template.
        """
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
        environment.globals["raise_exception"] = _raise_template_error
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(
                f"the chat template is not valid jinja ({error}): "
                "repair it, or name another with --template"
            ) from error
        end = vocabulary.end_of_document
        self._tokens = {
            "bos_token": "<s>" if b"<s>" in vocabulary.tokens else "",
            "eos_token": vocabulary.tokens[end].decode("utf-8") if end is not None else "",
        }

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Return the text of messages.

        Args:
            messages: the messages.
            prompt: append what makes the assistant answer.

        Raises:
            ConversationError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=prompt, **self._tokens
            )
        # The sandbox raises OverflowError for a long range.
        except (self._error, TypeError, KeyError, OverflowError) as error:
            raise ConversationError(f"the template refuses it: {error}") from error


def _raise_template_error(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def parse_messages(record: dict[str, Any], keys: MessageKeys) -> list[Message]:
    """Return the messages of one line: a list of them, or a prompt and a response.

    Raises:
        ConversationError: the line has neither, or the assistant writes nothing.
    """
    if keys.messages in record:
        messages = record[keys.messages]
    elif keys.prompt in record and keys.response in record:
        messages = [
            {"role": "user", "content": record[keys.prompt]},
            {"role": "assistant", "content": record[keys.response]},
        ]
    else:
        raise ConversationError(
            f"no key {keys.messages!r}, and not both {keys.prompt!r} and {keys.response!r}"
        )
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise ConversationError("its messages are not a list of objects with a role and a content")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise ConversationError("the assistant says nothing in it")
    return messages


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def segments(messages: Sequence[Message], template: ChatTemplate) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether the assistant writes it), in order.

    Together they are the whole rendered conversation.

    Raises:
        ConversationError: the template does not render a conversation as an extension of its
            beginning.
    """
    rendered = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:number], prompt=True)
        after = template.render(messages[: number + 1], prompt=False)
        if not before.startswith(rendered) or not after.startswith(before):
            raise ConversationError(_REWRITES_HISTORY)
        yield before[len(rendered) :], False
        yield after[len(before) :], True
        rendered = after
    conversation = template.render(messages, prompt=False)
    if not conversation.startswith(rendered):
        raise ConversationError(_REWRITES_HISTORY)
    yield conversation[len(rendered) :], False


class ConversationEncoder:
    """Encode conversations as ids and roles. A process needs one."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate) -> None:
        self.vocabulary, self.template = vocabulary, template
        self._special_ids = {
            vocabulary.tokens[index].decode("utf-8", "replace"): index
            for index in vocabulary.special
        }
        self._special_ids.pop("", None)
        longest_first = sorted(map(re.escape, self._special_ids), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first)) if longest_first else None

    def encode(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [N] and roles uint8 [N] of one conversation.

        Raises:
            ConversationError: the template refuses it, or a message spells a special token.
        """
        for message in messages:
            match = self._special.search(message["content"]) if self._special else None
            if match is not None:
                raise ConversationError(f"it spells the special token {match.group()!r}")
        ids: list[np.ndarray] = []
        roles: list[np.ndarray] = []
        for text, counts in segments(messages, self.template):
            part = self._encode_part(text, first=not ids)
            if len(part):
                ids.append(part)
                roles.append(np.full(len(part), COUNTS_FOR_LOSS if counts else 0, dtype=np.uint8))
        joined_ids, joined_roles = np.concatenate(ids), np.concatenate(roles)
        # No token of the conversation precedes its first one, so none can predict it.
        joined_roles[0] = STARTS_DOCUMENT
        return joined_ids, joined_roles

    def _encode_part(self, text: str, *, first: bool) -> np.ndarray:
        """Return the ids of a part of a conversation.

        The template's special tokens are looked up by name, because not every library finds them in
        text.
        """
        encoded: list[bytes] = []
        start = 0
        for match in self._special.finditer(text) if self._special is not None else ():
            special_id = self._special_ids[match.group()]
            encoded.append(self._encode_text(text[start : match.start()], first and not start))
            encoded.append(self.vocabulary.dtype.type(special_id).tobytes())
            start = match.end()
        encoded.append(self._encode_text(text[start:], first and not start))
        return np.frombuffer(b"".join(encoded), self.vocabulary.dtype)

    def _encode_text(self, text: str, first: bool) -> bytes:
        if not text:
            return b""
        if first:
            return self.vocabulary.encode_document(text)
        return self.vocabulary.encode_batch([text])[0]
