"""What the planner's tests run on each rank: the peak of a real run's memory, and what a layer keeps for its backward."""

from __future__ import annotations

from typing import Any

import torch

from megatron_kd.config import ModelSection, RunConfig, TeacherSection
from megatron_kd.planning.memory import Job
from tests.helpers.allocations import peak_bytes


def peak_of(
    rendezvous: str, config: RunConfig, teacher: ModelSection | None, steps: int = 2
) -> int:
    """Most bytes that torch held at one time while this rank built the run and made `steps` steps, from the allocator's own log.

    That is what torch.cuda.max_memory_allocated says on a GPU. A process's resident memory would add Python, the libraries and what the
    C allocator keeps for itself. Adam's state appears at the end of the first step. teacher: an untrained one's shape, saved before.
    """
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    if teacher is not None:
        folder = config.run.directory.parent / "teacher"
        # A sharded optimizer has nothing to save before its first step.
        whole = config.optimizer.model_copy(update={"distributed": False})
        run_section = config.run.model_copy(update={"directory": folder})
        own = {
            "model": teacher,
            "teacher": TeacherSection(),
            "run": run_section,
            "optimizer": whole,
        }
        build_run(config.model_copy(update=own), rendezvous=f"{rendezvous}-teacher").save()
        stop_groups()
        config = config.model_copy(
            update={"teacher": config.teacher.model_copy(update={"checkpoint": folder})}
        )

    def start() -> None:
        run = build_run(config, rendezvous=rendezvous)
        for _ in range(steps):
            train_step(run)

    peak = peak_bytes(start)
    stop_groups()
    return peak


def kept_by_a_layer(rendezvous: str, configs: list[RunConfig]) -> list[tuple[int, float]]:
    """Of each run: bytes of the tensors that autograd saved in one layer, parameters apart, and what the planner says."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run

    found = []
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
        found.append((total, Job(config, config.model.vocab_size, device="cpu").student.layer))
        del result
        stop_groups()
    return found
