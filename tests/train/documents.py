"""Compute the hidden states of packed documents. Spawned ranks import this module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from megatron_kd.config import RunConfig

# Tokens, and the number of the document of each token.
PackedSequence = tuple[list[int], list[int]]


def hidden_states(
    rendezvous: str, jobs: list[tuple[RunConfig, list[PackedSequence]]]
) -> list[list[torch.Tensor]]:
    """Return the final hidden states [S, H] of each sequence of each job.

    The list of a job is empty on a rank that does not compute them. The weights follow from the
    config's seed, the same in every layout.
    """
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform

    results = []
    for number, (config, sequences) in enumerate(jobs):
        groups = start_groups(
            start_platform("cpu", 0),
            config.parallel,
            timeout_seconds=60,
            rendezvous=f"{rendezvous}-{number}",
        )
        results.append(_run(config, sequences, groups))
        stop_groups()
    return results


def _run(config: RunConfig, sequences: list[PackedSequence], groups: Any) -> list[torch.Tensor]:
    from megatron_kd.models.student import Student
    from megatron_kd.train.forward import StudentInput
    from megatron_kd.train.step import forward_step

    outputs: list[torch.Tensor] = []

    def collect(hidden: torch.Tensor, **_: Any) -> Any:
        outputs.append(hidden[:, 0].detach().clone())
        count = torch.tensor(1.0)
        return hidden.sum() * 0, count.int(), {"x": torch.stack((count, count))}

    student = Student(config, groups, vocab_size=config.model.vocab_size or 0)
    student.sequence_length, student.micro_batch_size = len(sequences[0][0]), 1
    inputs = [StudentInput(_microbatch(config, sequence)) for sequence in sequences]
    with torch.no_grad():
        student.run_pipeline(partial(forward_step, objective=collect), inputs, forward_only=True)  # type: ignore[arg-type]
    return outputs


def _microbatch(config: RunConfig, sequence: PackedSequence) -> Any:
    from megatron_kd.data.batches import Microbatch
    from megatron_kd.targets.sample_keys import mark_starts

    tokens, documents = (torch.tensor([values]) for values in sequence)
    starts = torch.diff(documents, dim=1, prepend=documents[:, :1]) != 0
    return Microbatch.of(
        mark_starts(tokens, starts),
        tokens,
        torch.ones(tokens.shape),
        torch.tensor([0]),
        within_documents=config.data.document_attention == "within",
    )
