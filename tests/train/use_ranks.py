"""What two ranks do with a trained student: continuations and perplexity in every layout. Spawned ranks import it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_kd.config import RunConfig

PROMPTS = ("def main(", "import", "", "class Row:\n    ")
NEW_TOKENS = 24
MEASURED = 12


@dataclass
class Used:
    """By layout: greedy texts, sampled texts, the same one by one, and (cross-entropy, tokens). run: the run's own validation."""

    greedy: dict[str, list[str]] = field(default_factory=dict)
    sampled: dict[str, list[str]] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    uncached: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    perplexity: dict[str, tuple[float, int]] = field(default_factory=dict)
    run: dict[str, float | None] = field(default_factory=dict)


def train_and_use(rendezvous: str, config: RunConfig, valid: str, tokenizer_path: str) -> Used:
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.config import ParallelSection
    from megatron_kd.data.tokenizer import load_tokenizer
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform
    from megatron_kd.train.build import build_run
    from megatron_kd.train.evaluate import evaluate
    from megatron_kd.train.frozen import FrozenModel
    from megatron_kd.train.generate import Sampling, generate
    from megatron_kd.train.loop import train
    from megatron_kd.train.perplexity import measure

    run = build_run(config, rendezvous=rendezvous)
    train(run)
    used = Used(run=evaluate(run)["held_out"])
    folder = find_checkpoint(config.run.directory, what="test")
    info = read_info(folder, what="test")
    tokenizer, known = load_tokenizer(tokenizer_path)
    platform = start_platform("cpu")
    length = config.batch.sequence_length
    for name, sizes in {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}.items():
        layout = ParallelSection(**sizes)
        groups = start_groups(platform, layout, timeout_seconds=60)
        model = FrozenModel(folder, info, groups, layout, precision="fp32", sequence_length=length)

        def texts(sampling: Sampling, batch_size: int = 3, model: Any = model) -> list[Any]:
            return generate(model, tokenizer, PROMPTS, sampling, end_of_document=known.end_of_document, batch_size=batch_size)

        greedy = texts(Sampling(NEW_TOKENS))
        used.greedy[name] = [each.text for each in greedy]
        used.sampled[name] = [each.text for each in texts(Sampling(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=5))]
        if name == "one":
            used.tokens = [each.tokens for each in greedy]
            used.uncached = [_uncached(model, each.prompt, known.end_of_document) for each in greedy]
            used.alone = [each.text for each in texts(Sampling(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=5), 1)]
        cache = config.run.directory / "measured"
        result = measure(model, valid, "held_out", sequence_length=length, batch_size=3, index_cache=cache, max_sequences=MEASURED)
        used.perplexity[name] = (result.cross_entropy, result.tokens)
    stop_groups()
    return used


def _uncached(model: Any, prompt: list[int], end: int) -> list[int]:
    """Greedy continuation with the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        hidden = model.hidden(torch.tensor([ids]))
        following = int(model.logits(hidden)[-1, 0].argmax())
        if following == end:
            break
        ids.append(following)
    return ids[len(prompt) :]
