"""What two ranks do with a trained student: continuations and perplexity in every layout. Spawned ranks import it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_kd.config import RunConfig

PROMPTS = ("def main(", "import", "", "class Row:\n    ")
NEW_TOKENS = 24
VOCAB = 400
MEASURED = 12


@dataclass
class Used:
    """By layout: greedy texts, sampled texts, the same one by one, ids of those and of ids alone, (cross-entropy, tokens), and all that
    was measured beside the teacher. run: the run's own validation. near: beside another teacher; bend: how that one was made. plain:
    the same from whole logits in fp64. refused: what bad prompts of ids were told."""

    greedy: dict[str, list[str]] = field(default_factory=dict)
    sampled: dict[str, list[str]] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    ids: dict[str, list[list[int]]] = field(default_factory=dict)
    of_ids: dict[str, list[list[int]]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    uncached: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    perplexity: dict[str, tuple[float, int]] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    plain: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    bend: float = 0.0
    plain_scores: list[float] = field(default_factory=list)
    run: dict[str, float | None] = field(default_factory=dict)


def train_and_use(rendezvous: str, config: RunConfig, valid: str, tokenizer_path: str) -> Used:
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.config import ParallelSection
    from megatron_kd.data.tokenizer import load_tokenizer
    from megatron_kd.inference.frozen_model import FrozenModel
    from megatron_kd.inference.generate import Sampling, generate, generate_ids
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform
    from megatron_kd.train.build import build_run
    from megatron_kd.train.evaluate import evaluate
    from megatron_kd.train.loop import train

    run = build_run(config, rendezvous=rendezvous)
    train(run)
    used = Used(run=evaluate(run)["held_out"])
    folder = find_checkpoint(config.run.directory, what="test")
    info = read_info(folder, what="test")
    tokenizer, known = load_tokenizer(tokenizer_path)
    teaches = find_checkpoint(config.teacher.checkpoint, what="test")
    taught = read_info(teaches, what="test")
    platform = start_platform("cpu")
    length = config.batch.sequence_length
    for name, sizes in {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}.items():
        layout = ParallelSection(**sizes)
        groups = start_groups(platform, layout, timeout_seconds=60)
        model = FrozenModel(folder, info, groups, layout, precision="fp32", sequence_length=length)

        def texts(sampling: Sampling, batch_size: int = 3, model: Any = model) -> list[Any]:
            return generate(
                model,
                tokenizer,
                PROMPTS,
                sampling,
                end_of_document=known.end_of_document,
                batch_size=batch_size,
            )

        greedy = texts(Sampling(NEW_TOKENS))
        used.greedy[name] = [each.text for each in greedy]
        drawn = texts(Sampling(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=5))
        used.sampled[name], used.ids[name] = (
            [each.text for each in drawn],
            [each.tokens for each in drawn],
        )
        prompts, sampling = (
            [each.prompt for each in drawn],
            Sampling(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=5),
        )
        by_ids = generate_ids(
            model, prompts, sampling, end_of_document=known.end_of_document, batch_size=2
        )
        used.of_ids[name] = [each.tokens for each in by_ids]
        assert not any(each.text for each in by_ids)
        if name == "one":
            used.tokens = [each.tokens for each in greedy]
            used.refused = [
                _refusal(model, ids, stop) for ids, stop in (([], ()), ([VOCAB], ()), ([1], ("x",)))
            ]
            used.uncached = [
                _uncached(model, each.prompt, known.end_of_document) for each in greedy
            ]
            used.alone = [
                each.text
                for each in texts(Sampling(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=5), 1)
            ]
        built: Any = {"precision": "fp32", "sequence_length": length}
        teacher = FrozenModel(teaches, taught, groups, layout, **built)
        _measure(
            used,
            name,
            model,
            teacher,
            FrozenModel(folder, info, groups, layout, **built),
            valid,
            config,
        )
    stop_groups()
    return used


def _measure(
    used: Used, name: str, model: Any, teacher: Any, near: Any, valid: str, config: RunConfig
) -> None:
    """Everything about losses in one layout. near: the student again, to be made into a model that agrees with it on some tokens."""
    from megatron_kd.inference.perplexity import measure

    length, cache = config.batch.sequence_length, config.run.directory / "measured"
    options: Any = {"sequence_length": length, "index_cache": cache, "max_sequences": MEASURED}
    if name == "one":
        used.bend = _bend_that_parts(
            model, near, valid, length=options["sequence_length"], cache=cache
        )
    if model.groups.is_last_stage:
        _bend(near, used.bend)
    result = measure(model, valid, "held_out", batch_size=3, **options)
    used.perplexity[name] = (result.cross_entropy, result.tokens)
    used.measured[name] = measure(
        model, valid, "held_out", batch_size=2, teacher=teacher, **options
    ).describe(valid)
    used.measured[f"{name} near"] = measure(
        model, valid, "held_out", batch_size=3, teacher=near, **options
    ).describe(valid)
    used.scores[name] = _scores((model, teacher), valid, config.run.directory / f"scores-{name}")
    if name == "one":
        used.plain_scores = _plain_scores(model, teacher, valid)
        used.plain = {
            "": _plain(model, teacher, valid, length, cache),
            " near": _plain(model, near, valid, length, cache),
        }


def _bend(near: Any, strength: float) -> None:
    scale = near.chunk.decoder.final_layernorm.weight.data
    scale.mul_(1 + strength * torch.linspace(-2.0, 2.0, len(scale)))


def _bend_that_parts(model: Any, near: Any, valid: str, *, length: int, cache: Any) -> float:
    """The strength at which about half of the first tokens keep their likeliest id; which one that is depends on the student's weights."""
    from megatron_kd.inference.perplexity import _batches

    dataset = _batches(
        model, valid, "held_out", length, model.groups.data_size, cache, MEASURED
    ).dataset
    tokens = torch.stack([dataset[number]["tokens"] for number in range(4)])
    scale = near.chunk.decoder.final_layernorm.weight.data
    before, wanted = scale.clone(), model.logits(model.hidden(tokens)).argmax(-1)
    agreed = {}
    for strength in torch.linspace(0.02, 1.0, 50).tolist():
        _bend(near, strength)
        agreed[strength] = float(
            (near.logits(near.hidden(tokens)).argmax(-1) == wanted).double().mean()
        )
        scale.copy_(before)
    return min(agreed, key=lambda strength: abs(agreed[strength] - 0.5))


def _refusal(model: Any, ids: list[int], stop: tuple[str, ...]) -> str:
    from megatron_kd.config import ConfigError
    from megatron_kd.inference.generate import Sampling, generate_ids

    try:
        generate_ids(model, [[1], ids], Sampling(1, stop=stop), end_of_document=None, batch_size=2)
    except ConfigError as error:
        return str(error)
    return "not refused"


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


def _plain(model: Any, teacher: Any, valid: str, length: int, cache: Any) -> dict[str, float]:
    """What `measure` reports, from whole logits, token by token; this rank alone holds both models."""
    from megatron_kd.inference.perplexity import _batches

    rows: list[list[torch.Tensor]] = []
    dataset = _batches(
        model, valid, "held_out", length, model.groups.data_size, cache, MEASURED
    ).dataset
    for number in range(MEASURED):
        sample = dataset[number]
        ours, theirs = (
            each.logits(each.hidden(sample["tokens"][None]))[:, 0].double().log_softmax(-1)
            for each in (model, teacher)
        )
        label = sample["labels"][:, None]
        same = (ours.argmax(-1) == theirs.argmax(-1)).double()
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        hit = (ours.argmax(-1) == sample["labels"]).double()
        rows.append(
            [
                -ours.gather(1, label)[:, 0],
                hit,
                kl,
                same,
                -theirs.gather(1, label)[:, 0],
                ours.amax(-1).exp(),
            ]
        )
    loss, hit, kl, same, teacher_loss, confidence = (
        torch.cat(column) for column in zip(*rows, strict=True)
    )
    error = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        error += abs(float((hit - confidence)[inside].sum())) / len(hit)
    found = {
        "cross_entropy": loss,
        "accuracy": hit,
        "teacher_kl": kl,
        "teacher_agreement": same,
        "teacher_cross_entropy": teacher_loss,
    }
    return {
        "calibration_error": error,
        **{name: float(values.mean()) for name, values in found.items()},
    }


WINDOW = 40


def _scores(models: Any, valid: str, folder: Any) -> np.ndarray:
    """What ranks together find of the first documents, in shards of few tokens."""
    from megatron_kd.data.token_files import read_index
    from megatron_kd.inference.document_scores import cut_shards, read_scores, score_shards

    index = read_index(valid)
    shards = cut_shards(index.lengths.astype(np.int64), 400)
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    mine = list(range(len(shards)))[models[0].groups.data_rank :: models[0].groups.data_size]
    options: Any = {"sequence_length": WINDOW, "batch_size": 5, "done": lambda shards, tokens: None}
    score_shards(models, valid, index, shards, mine, folder, **options)
    dist.barrier()
    return read_scores(folder, shards)


def _plain_scores(teacher: Any, reference: Any, valid: str) -> list[float]:
    """Document by document and window by window, from whole logits in fp32."""
    from megatron_kd.data.token_files import read_index

    index = read_index(valid)
    tokens = torch.from_numpy(np.fromfile(f"{valid}.bin", dtype=index.dtype).astype(np.int64))
    found = []
    for document in tokens.split(index.lengths.tolist()):
        ratios = []
        for begin in range(0, len(document) - 1, WINDOW):
            window = document[begin : begin + WINDOW + 1]
            ours, theirs = (
                each.logits(each.hidden(window[None, :-1]))[:, 0].log_softmax(-1)
                for each in (teacher, reference)
            )
            ratios.append((ours - theirs).gather(1, window[1:, None])[:, 0].double())
        found.append(float(torch.cat(ratios).mean()) if ratios else math.nan)
    return found
