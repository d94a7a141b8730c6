"""Hold the model that trains: chunks under megatron-core's DDP, and its pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kd.config import RunConfig
from megatron_kd.config.hidden_state_pairs import Projection
from megatron_kd.models.gpt_model import build_chunks
from megatron_kd.models.initialize import initialize_weights
from megatron_kd.models.projections import add_projections
from megatron_kd.models.transformer_config import transformer_config
from megatron_kd.parallel.groups import Groups


class Student:
    """Hold this rank's part of the student.

    Args:
        run: the run.
        groups: process groups of the student's layout.
        vocab_size: true vocabulary size.
        projections: matrices that train along with the student, see models/projections.py.

    Attributes:
        chunks: DDP-wrapped chunks, one per virtual pipeline stage.
        models: the GPTModels inside.
        config: their TransformerConfig.
        on_drained: functions that are called in every training step when this rank's part of the
            pipeline is done, before gradients are reduced.
    """

    def __init__(
        self,
        run: RunConfig,
        groups: Groups,
        *,
        vocab_size: int,
        projections: Sequence[Projection] = (),
    ) -> None:
        self.groups, self.vocab_size = groups, vocab_size
        self.sequence_length = run.batch.sequence_length
        self.micro_batch_size = run.batch.micro_batch_size
        self.config: TransformerConfig = transformer_config(
            run.model, run.parallel, groups.platform, precision=run.train.precision
        )
        self.models: list[GPTModel] = build_chunks(
            run.model,
            self.config,
            groups,
            vocab_size=vocab_size,
            sequence_length=run.batch.sequence_length,
            within_documents=run.data.document_attention == "within",
        )
        add_projections(self.models, projections, self.config)
        initialize_weights(self.models, run.model, vocab_size=vocab_size, seed=run.train.seed)
        self.chunks = self._wrap(run)
        self.on_drained: list[Callable[[], None]] = []
        self.config.finalize_model_grads_func = self._finalize
        if run.parallel.overlap_grad_reduce:
            self._overlap_gradient_reduction(run.parallel.overlap_param_gather)

    def _wrap(self, run: RunConfig) -> list[DistributedDataParallel]:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=run.parallel.overlap_grad_reduce,
            overlap_param_gather=run.parallel.overlap_param_gather,
            use_distributed_optimizer=run.optimizer.distributed,
        )
        return [
            DistributedDataParallel(
                self.config,
                settings,
                model,
                disable_bucketing=index > 0,
                pg_collection=self.groups.collection,
            )
            for index, model in enumerate(self.models)
        ]

    def _overlap_gradient_reduction(self, gather_parameters: bool) -> None:
        """Hold gradient reduction back until the last microbatch of a chunk."""
        self.config.no_sync_func = self._chunk_methods("no_sync")
        if len(self.chunks) > 1:
            self.config.grad_sync_func = self._chunk_methods("start_grad_sync")
            if gather_parameters:
                self.config.param_sync_func = self._chunk_methods("start_param_sync")

    def _chunk_methods(self, name: str) -> Any:
        """Return the method of the only chunk, or the list of those of all chunks."""
        methods = [getattr(chunk, name) for chunk in self.chunks]
        return methods if len(methods) > 1 else methods[0]

    def _finalize(self, *arguments: Any, **options: Any) -> None:
        for function in self.on_drained:
            function()
        finalize_model_grads(*arguments, **options)

    def zero_grad(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def gather_weights(self) -> None:
        """Complete the weights of the last update on every rank, for readers before the next step.

        With overlap_param_gather an update leaves each rank its own shard, and the forward pass of
        the next step gathers the others.

        Collectives:
            All-gathers over the data-parallel group, with overlap_param_gather only.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def train(self, training: bool) -> None:
        """Switch dropout on or off."""
        for chunk in self.chunks:
            chunk.train(training)

    def run_pipeline(
        self, forward_step: Callable[..., Any], batches: list[Any], *, forward_only: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """Run megatron-core's pipeline schedule over the microbatches.

        Gradients end summed and divided by the global number of tokens.

        Args:
            forward_step: maps (iterator, chunk) to (output, loss function).
            batches: the microbatches of one step, whatever `forward_step` takes.
            forward_only: True to compute no gradients.

        Returns:
            The reports of the last stage, one per microbatch; an empty list on other stages.

        Collectives:
            Those of a step over the model-parallel and data-parallel groups.
        """
        iterators: list[Iterator[Any]] = [iter(batches) for _ in self.chunks]
        run_schedule = get_forward_backward_func()
        with torch.set_grad_enabled(not forward_only):
            reports: list[dict[str, torch.Tensor]] = run_schedule(
                forward_step_func=forward_step,
                data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(batches),
                seq_length=self.sequence_length,
                micro_batch_size=self.micro_batch_size,
                forward_only=forward_only,
            )
        return reports
