"""The model that trains: chunks under megatron-core's DDP, its gradients finalised by megatron-core."""

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
    """This rank's part of the student.

    chunks: DDP-wrapped, one per virtual stage. models: the GPTModels inside. config: their TransformerConfig. projections: what trains
    along with it, see models/projections.py. on_drained: called in every training step when this rank's part of the pipeline is done,
    before gradients are reduced.
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
        self.sequence_length, self.micro_batch_size = (
            run.batch.sequence_length,
            run.batch.micro_batch_size,
        )
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
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=run.parallel.overlap_grad_reduce,
            overlap_param_gather=run.parallel.overlap_param_gather,
            use_distributed_optimizer=run.optimizer.distributed,
        )
        self.chunks = [
            DistributedDataParallel(
                self.config,
                ddp,
                model,
                disable_bucketing=index > 0,
                pg_collection=groups.collection,
            )
            for index, model in enumerate(self.models)
        ]
        self.on_drained: list[Callable[[], None]] = []
        self.config.finalize_model_grads_func = self._finalize
        if run.parallel.overlap_grad_reduce:
            self._overlap(run.parallel.overlap_param_gather)

    def _overlap(self, gather_parameters: bool) -> None:
        """Tell the schedule how to hold gradient reduction back until a chunk's last microbatch."""

        def each(name: str) -> Any:
            functions = [getattr(chunk, name) for chunk in self.chunks]
            return functions if len(functions) > 1 else functions[0]

        self.config.no_sync_func = each("no_sync")
        if len(self.chunks) > 1:
            self.config.grad_sync_func = each("start_grad_sync")
            if gather_parameters:
                self.config.param_sync_func = each("start_param_sync")

    def _finalize(self, *arguments: Any, **named: Any) -> None:
        for each in self.on_drained:
            each()
        finalize_model_grads(*arguments, **named)

    def zero_grad(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def gather_weights(self) -> None:
        """Make the last update's weights whole on every rank, for whoever reads them before the next step. Collective over the
        data-parallel group where it sends anything.

        With overlap_param_gather an update leaves each rank its own shard, and the others come in the next step's forward pass.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def train(self, training: bool) -> None:
        """Switch dropout on or off."""
        for chunk in self.chunks:
            chunk.train(training)

    def run_schedule(
        self, forward_step: Callable[..., Any], batches: list[Any], *, forward_only: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """One pass over the microbatches in megatron-core's schedule; gradients end summed and divided by the global tokens.

        `forward_step(iterator, chunk) -> (output, loss_function)`. Returns the last stage's reports, one per microbatch, and
        an empty list on other stages. Collective over the model- and data-parallel groups.
        """
        iterators: list[Iterator[Any]] = [iter(batches) for _ in self.chunks]
        schedule = get_forward_backward_func()
        with torch.set_grad_enabled(not forward_only):
            reports: list[dict[str, torch.Tensor]] = schedule(
                forward_step_func=forward_step,
                data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(batches),
                seq_length=self.sequence_length,
                micro_batch_size=self.micro_batch_size,
                forward_only=forward_only,
            )
        return reports
