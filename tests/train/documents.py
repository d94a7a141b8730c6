"""What a model says of a document that is packed behind another one. A module of its own, because spawned ranks import it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from megatron_kd.config import RunConfig


def hidden_states(
    rendezvous: str, jobs: list[tuple[RunConfig, list[tuple[list[int], list[int]]]]]
) -> list[list[Any]]:
    """For each (config, sequences of (tokens, document of each token)): the final hidden states [S, H] of each sequence, or None
    where this rank has none. The weights are those of the config's seed, the same in any layout."""
    from megatron_kd.data.batches import Microbatch
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform
    from megatron_kd.targets.keys import mark_starts
    from megatron_kd.train.forward import StudentInput
    from megatron_kd.train.step import forward_step

    found = []
    for number, (config, sequences) in enumerate(jobs):
        from megatron_kd.models.student import Student

        platform = start_platform("cpu", 0)
        groups = start_groups(
            platform, config.parallel, timeout_seconds=60, rendezvous=f"{rendezvous}-{number}"
        )
        student = Student(config, groups, vocab_size=config.model.vocab_size or 0)
        kept: list[Any] = []

        def keep(hidden: torch.Tensor, kept: list[Any] = kept, **_: Any) -> Any:
            kept.append(hidden[:, 0].detach().clone())
            count = torch.tensor(1.0)
            return hidden.sum() * 0, count.int(), {"x": torch.stack((count, count))}

        batches = []
        for tokens, documents in sequences:
            own = torch.tensor([documents])
            starts = torch.diff(own, dim=1, prepend=own[:, :1]) != 0
            row = torch.tensor([tokens])
            named = mark_starts(row, starts)
            within = config.data.document_attention == "within"
            batch = Microbatch.of(
                named, row, torch.ones(row.shape), torch.tensor([0]), within_documents=within
            )
            batches.append(StudentInput(batch))
        student.sequence_length, student.micro_batch_size = len(sequences[0][0]), 1
        with torch.no_grad():
            student.run_pipeline(
                partial(forward_step, objective=keep),
                batches,
                forward_only=True,
            )  # type: ignore[arg-type]
        found.append(kept)
        stop_groups()
    return found
