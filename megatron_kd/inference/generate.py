"""Continue prompts with a frozen model and a key/value cache, in any tensor and pipeline layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.config import ConfigError
from megatron_kd.inference.frozen_model import FrozenModel, KeyValueCache


class Tokenizer(Protocol):
    """Describe the methods of a tokenizer that generation needs."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ones."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


@dataclass(frozen=True)
class Sampling:
    """Choose how the next token is selected.

    Attributes:
        max_new_tokens: Longest continuation, tokens.
        temperature: Divides the logits. 0 takes the most probable id.
        top_p: Sample from the smallest set of most probable ids whose probability reaches it.
        seed: Seed of the samples. A sample depends on the seed and on the positions of the prompt
            and of the token, so batches and layouts do not change the text.
        stop: Texts before which a continuation ends.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature ({self.temperature}) must be >= 0 and finite (0: the most probable "
                "id)"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p ({self.top_p}) must be in (0, 1]")
        if "" in self.stop:
            raise ConfigError("a stop string is empty")


@dataclass
class Continuation:
    """Hold a prompt and its continuation.

    Attributes:
        prompt: Ids of the prompt.
        tokens: New ids, without the end-of-document id.
        text: Text of the new ids; empty without a tokenizer.
        finish: "end" (of the document), "stop" (string) or "length"; empty while it continues.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""


def generate(
    model: FrozenModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    end_of_document: int | None,
    batch_size: int,
) -> list[Continuation]:
    """Continue each prompt. Collective over the world, which must be one replica of the model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Texts. An empty one starts a document.
        sampling: How tokens are selected.
        end_of_document: Id that ends a document; None if the tokenizer has none.
        batch_size: Prompts that are continued together.

    Raises:
        ConfigError: Prompt and continuation exceed the model's window, or an empty prompt has no id
            to start from.
    """
    if end_of_document is None and not all(prompts):
        raise ConfigError(
            "an empty prompt begins after an end of document, and this tokenizer has none: give a "
            "prompt"
        )
    # A document starts after the end of another one.
    start = [] if end_of_document is None else [end_of_document]
    continuations = [Continuation(tokenizer.encode(prompt) or start) for prompt in prompts]
    generator = _Generator(model, tokenizer, sampling, end_of_document)
    return generator.run(continuations, batch_size)


def generate_ids(
    model: FrozenModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_of_document: int | None,
    batch_size: int,
) -> list[Continuation]:
    """Continue prompts of ids, for a model without a tokenizer.

    Every `text` stays empty. To get several samples of a prompt, repeat it: its position decides
    the samples. Collective over the world, which must be one replica of the model.

    Args:
        model: The model.
        prompts: Ids of each prompt, at least one.
        sampling: How tokens are selected.
        end_of_document: Id that ends a document; None for none.
        batch_size: Prompts that are continued together.

    Raises:
        ConfigError: A prompt is empty or has an id outside the vocabulary, or there are stop
            strings.
    """
    if sampling.stop:
        raise ConfigError("stop strings need a tokenizer, which ids do not have: leave them out")
    for position, prompt in enumerate(prompts):
        if not prompt or min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise ConfigError(
                f"prompt {position} must have at least one id, all in [0, {model.vocab_size}), the "
                "model's vocabulary"
            )
    continuations = [Continuation(list(prompt)) for prompt in prompts]
    return _Generator(model, None, sampling, end_of_document).run(continuations, batch_size)


@dataclass(frozen=True)
class _Generator:
    """Continue batches of prompts."""

    model: FrozenModel
    tokenizer: Tokenizer | None
    sampling: Sampling
    end_of_document: int | None

    def run(self, continuations: list[Continuation], batch_size: int) -> list[Continuation]:
        longest = max((len(continuation.prompt) for continuation in continuations), default=0)
        problem = self.model.model.window_problem(longest + self.sampling.max_new_tokens)
        if problem is not None:
            raise ConfigError(f"prompt and continuation together {problem}")
        for start in range(0, len(continuations), batch_size):
            self._continue_batch(continuations[start : start + batch_size], start)
        return continuations

    def _continue_batch(self, batch: list[Continuation], first_prompt: int) -> None:
        """Run the common length of the prompts at once, then one token at a time.

        Prompts that are longer take their own next id instead of the selected one.

        Args:
            batch: Prompts without continuation.
            first_prompt: Position of the first one among all prompts.
        """
        model, device = self.model, self.model.groups.platform.device
        lengths = [len(continuation.prompt) for continuation in batch]
        cache = KeyValueCache(len(batch), max(lengths) + self.sampling.max_new_tokens)
        position = min(lengths)
        tokens = torch.tensor(
            [continuation.prompt[:position] for continuation in batch], device=device
        )
        hidden = model.hidden(tokens, 0, cache)
        while True:
            selected = None
            if hidden is not None:
                selected = _select(model.logits(hidden)[0], first_prompt, position, self.sampling)
            ids = _broadcast(model, selected, len(batch))
            for index, continuation in enumerate(batch):
                if position < lengths[index]:
                    ids[index] = continuation.prompt[position]
                elif not continuation.finish:
                    self._append(continuation, ids[index])
            if all(continuation.finish for continuation in batch):
                return
            # Finished sequences stay in the batch. Their further tokens are never read.
            hidden = model.hidden(torch.tensor(ids, device=device)[:, None], position, cache)
            position += 1

    def _append(self, continuation: Continuation, token: int) -> None:
        """Append a token, and finish the continuation if that ends it."""
        if token == self.end_of_document:
            continuation.finish = "end"
            return
        continuation.tokens.append(token)
        if self.tokenizer is not None:
            continuation.text = self.tokenizer.decode(continuation.tokens)
        text, stop_strings = continuation.text, self.sampling.stop
        stop_positions = [text.find(stop) for stop in stop_strings if stop in text]
        if stop_positions:
            continuation.text, continuation.finish = text[: min(stop_positions)], "stop"
        elif len(continuation.tokens) == self.sampling.max_new_tokens:
            continuation.finish = "length"


def _select(logits: Tensor, first_prompt: int, position: int, sampling: Sampling) -> Tensor:
    """Return the next ids, int64 [B], from logits [B, V].

    They are the same on every tensor-parallel rank, whose logits are the same.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (
        (logits.double() / sampling.temperature)
        .softmax(-1)
        .sort(dim=-1, descending=True, stable=True)
    )
    preceding_mass = probabilities.cumsum(-1) - probabilities
    top_mass = probabilities.masked_fill(preceding_mass >= sampling.top_p, 0.0)
    uniform = torch.tensor(
        [_uniform(sampling.seed, first_prompt + index, position) for index in range(len(logits))],
        dtype=torch.float64,
    )
    is_reached = top_mass.cumsum(-1) > (uniform.to(ids.device) * top_mass.sum(-1))[:, None]
    return ids.gather(1, is_reached.int().argmax(-1, keepdim=True))[:, 0]


def _uniform(seed: int, prompt: int, position: int) -> float:
    """Return a number in [0, 1) that is a function of the three numbers."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _broadcast(model: FrozenModel, selected: Tensor | None, count: int) -> list[int]:
    """Return the ids that the last stage selected, on every rank.

    Collectives:
        One broadcast along the pipeline group.
    """
    if selected is None:
        selected = torch.empty(count, dtype=torch.int64, device=model.groups.platform.device)
    if model.groups.pipeline_size > 1:
        group = model.groups.collection.pp
        last_rank = dist.get_global_rank(group, model.groups.pipeline_size - 1)
        dist.broadcast(selected, src=last_rank, group=group)
    ids: list[int] = selected.tolist()
    return ids
