"""Measure on each rank: the peak memory of a real run, and the bytes that a layer keeps."""

from __future__ import annotations

from typing import Any

import torch

from megatron_kd.config import ModelSection, RunConfig, TeacherSection
from megatron_kd.planning.planned_run import PlannedRun
from tests.helpers.allocations import peak_bytes


def peak_of(
    rendezvous: str, config: RunConfig, teacher: ModelSection | None, steps: int = 2
) -> int:
    """Return the most bytes that torch held at one time while this rank built and trained a run.

    They come from the allocator's log, as torch.cuda.max_memory_allocated does on a GPU. Resident
    memory of the process would add Python, the libraries and what the C allocator keeps for itself.
    Adam's state appears at the end of the first step.

    Args:
        rendezvous: rendezvous of the ranks.
        config: the run.
        teacher: shape of an untrained teacher, which is saved first; None: no teacher.
        steps: number of steps.
    """
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    if teacher is not None:
        config = _with_saved_teacher(rendezvous, config, teacher)

    def start() -> None:
        run = build_run(config, rendezvous=rendezvous)
        for _ in range(steps):
            train_step(run)

    peak = peak_bytes(start)
    stop_groups()
    return peak


def _with_saved_teacher(rendezvous: str, config: RunConfig, teacher: ModelSection) -> RunConfig:
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run

    folder = config.run.directory.parent / "teacher"
    sections = {
        "model": teacher,
        "teacher": TeacherSection(),
        "run": config.run.model_copy(update={"directory": folder}),
        # A sharded optimizer has nothing to save before its first step.
        "optimizer": config.optimizer.model_copy(update={"distributed": False}),
    }
    build_run(config.model_copy(update=sections), rendezvous=f"{rendezvous}-teacher").save()
    stop_groups()
    section = config.teacher.model_copy(update={"checkpoint": folder})
    return config.model_copy(update={"teacher": section})


def kept_by_a_layer(rendezvous: str, configs: list[RunConfig]) -> list[tuple[int, float]]:
    """Return the bytes that autograd saved in one layer of each run, and the planned bytes.

    Parameters do not count.
    """
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run

    sizes = []
    for number, config in enumerate(configs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        model: Any = run.student.models[0]
        microbatch = run.train_data.microbatches(0)[0]
        saved: dict[int, int] = {}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch, dtype = config.batch, run.student.config.params_dtype
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = torch.randn(
                batch.sequence_length,
                batch.micro_batch_size,
                config.model.hidden_size,
                requires_grad=True,
                dtype=dtype,
            )
            angles = model.rotary_pos_emb(batch.sequence_length)
            result = model.decoder.layers[0](
                hidden, attention_mask=microbatch.attention_mask(), rotary_pos_emb=angles
            )
        total = sum(size for pointer, size in saved.items() if pointer not in parameters)
        assert config.model.vocab_size is not None
        planned = PlannedRun(config, config.model.vocab_size, device="cpu")
        sizes.append((total, planned.student_shape.layer))
        del result
        stop_groups()
    return sizes
