"""Continuations of prompts from a frozen model, with a key/value cache, in any tensor- and pipeline-parallel layout."""

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
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        ...


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest id; else ids are drawn from the smallest set whose probability reaches top_p. seed: with
    the place of the prompt and of the token it decides each draw, so batches and layouts do not change the text.
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
                f"temperature ({self.temperature}) must be >= 0 and finite (0: the likeliest id)"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p ({self.top_p}) must be in (0, 1]")
        if "" in self.stop:
            raise ConfigError("a stop string is empty")


@dataclass
class Continuation:
    """tokens: new ids, the end-of-document id not among them. finish: "end" (of the document), "stop" (string), "length"."""

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
    """Continue each prompt; an empty one starts a document. Collective over the world, which must be one replica of the model."""
    # A document starts where another ended.
    found = [
        Continuation(
            tokenizer.encode(prompt) or ([] if end_of_document is None else [end_of_document])
        )
        for prompt in prompts
    ]
    return _continue_all(model, tokenizer, found, sampling, end_of_document, batch_size)


def generate_ids(
    model: FrozenModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_of_document: int | None,
    batch_size: int,
) -> list[Continuation]:
    """`generate` for a model without a tokenizer: prompts are ids, and every `text` stays empty. Give a prompt as often as samples of it
    are wanted: each place has draws of its own. ConfigError for an empty prompt, an id outside the vocabulary, and stop strings.
    """
    if sampling.stop:
        raise ConfigError("stop strings need a tokenizer, which ids do not have: leave them out")
    for place, prompt in enumerate(prompts):
        if not prompt or min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise ConfigError(
                f"prompt {place} must have at least one id, all in [0, {model.vocab_size}), the model's vocabulary"
            )
    return _continue_all(
        model,
        None,
        [Continuation(list(prompt)) for prompt in prompts],
        sampling,
        end_of_document,
        batch_size,
    )


def _continue_all(
    model: FrozenModel,
    tokenizer: Tokenizer | None,
    found: list[Continuation],
    sampling: Sampling,
    end_of_document: int | None,
    batch_size: int,
) -> list[Continuation]:
    window = model.model.window_problem(
        max((len(each.prompt) for each in found), default=0) + sampling.max_new_tokens
    )
    if window is not None:
        raise ConfigError(f"prompt and continuation together {window}")
    for start in range(0, len(found), batch_size):
        _continue(
            model, tokenizer, found[start : start + batch_size], start, sampling, end_of_document
        )
    return found


def _continue(
    model: FrozenModel,
    tokenizer: Tokenizer | None,
    batch: list[Continuation],
    first: int,
    sampling: Sampling,
    end_of_document: int | None,
) -> None:
    """One batch: the common length of the prompts at once, then id by id; where a prompt goes on, its own id is taken."""
    lengths = [len(each.prompt) for each in batch]
    device = model.groups.platform.device
    cache = KeyValueCache(len(batch), max(lengths) + sampling.max_new_tokens)
    position = min(lengths)
    tokens = torch.tensor([each.prompt[:position] for each in batch], device=device)
    hidden = model.hidden(tokens, 0, cache)
    while True:
        chosen = _share(
            model,
            None if hidden is None else _choose(model.logits(hidden)[0], first, position, sampling),
            len(batch),
        )
        for row, each in enumerate(batch):
            if position < lengths[row]:
                chosen[row] = each.prompt[position]
            elif not each.finish:
                _take(each, chosen[row], tokenizer, sampling, end_of_document)
        if all(each.finish for each in batch):
            return
        # What follows a finished text is never read.
        hidden = model.hidden(torch.tensor(chosen, device=device)[:, None], position, cache)
        position += 1


def _take(
    each: Continuation,
    token: int,
    tokenizer: Tokenizer | None,
    sampling: Sampling,
    end_of_document: int | None,
) -> None:
    if token == end_of_document:
        each.finish = "end"
        return
    each.tokens.append(token)
    if tokenizer is not None:
        each.text = tokenizer.decode(each.tokens)
    cuts = [each.text.find(stop) for stop in sampling.stop if stop in each.text]
    if cuts:
        each.text, each.finish = each.text[: min(cuts)], "stop"
    elif len(each.tokens) == sampling.max_new_tokens:
        each.finish = "length"


def _choose(logits: Tensor, first: int, position: int, sampling: Sampling) -> Tensor:
    """int64 [B], the next ids from logits [B, V]; the same on every tensor-parallel rank, whose logits are the same."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (
        (logits.double() / sampling.temperature)
        .softmax(-1)
        .sort(dim=-1, descending=True, stable=True)
    )
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    draws = torch.tensor(
        [_uniform(sampling.seed, first + row, position) for row in range(len(logits))],
        dtype=torch.float64,
    )
    reached = kept.cumsum(-1) > (draws.to(kept.device) * kept.sum(-1))[:, None]
    return ids.gather(1, reached.int().argmax(-1, keepdim=True))[:, 0]


def _uniform(seed: int, prompt: int, position: int) -> float:
    """In [0, 1), a function of the three numbers."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _share(model: FrozenModel, chosen: Tensor | None, count: int) -> list[int]:
    """The last stage's choice on every rank. One broadcast along the pipeline."""
    if chosen is None:
        chosen = torch.empty(count, dtype=torch.int64, device=model.groups.platform.device)
    if model.groups.pipeline_size > 1:
        group = model.groups.collection.pp
        dist.broadcast(
            chosen, src=dist.get_global_rank(group, model.groups.pipeline_size - 1), group=group
        )
    ids: list[int] = chosen.tolist()
    return ids
