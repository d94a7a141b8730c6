"""Load a checkpoint's model for reading: logits, losses on held-out tokens, continuations.

Pipeline stages pass hidden states on by plain point-to-point messages. One forward pass at a time
needs no pipeline schedule.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_kd.checkpoint.sharded_state import load_weights
from megatron_kd.checkpoint.store import CheckpointInfo
from megatron_kd.config import ConfigError, ModelSection, ParallelSection
from megatron_kd.data.tokenizer import TokenizerInfo, load_tokenizer
from megatron_kd.models.gpt_model import build_chunks, output_weight
from megatron_kd.models.transformer_config import transformer_config
from megatron_kd.parallel.collectives import all_gather
from megatron_kd.parallel.groups import Groups


def inference_layout(
    info: CheckpointInfo, *, tensor: int, pipeline: int, world_size: int
) -> ParallelSection:
    """Return the layout of a frozen model.

    Args:
        info: Description of the checkpoint.
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        world_size: Ranks of the world.

    Raises:
        ConfigError: On every rank: the sizes do not divide the model or the world.
    """
    model = info.model_section()
    if min(tensor, pipeline) < 1:
        raise ConfigError(f"--tensor ({tensor}) and --pipeline ({pipeline}) must be at least 1")
    for name, size, option, divisor in model.indivisible_sizes(tensor=tensor, stages=pipeline):
        raise ConfigError(
            f"the model's {name} ({size}) must be a multiple of --{option} ({divisor})"
        )
    if world_size % (tensor * pipeline):
        raise ConfigError(
            f"{world_size} processes cannot be split into --tensor x --pipeline = "
            f"{tensor * pipeline}"
        )
    return ParallelSection(tensor=tensor, pipeline=pipeline)


def load_checkpoint_tokenizer(
    folder: Path, info: CheckpointInfo, path: Path | None
) -> tuple[Any, TokenizerInfo]:
    """Load the tokenizer of a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        info: Its description.
        path: The tokenizer; None for the one that the run's config.toml names.

    Raises:
        ConfigError: There is no tokenizer, or its vocabulary is not the model's.
    """
    run_file = folder.parent.parent / "config.toml"
    data = {}
    if run_file.is_file():
        data = tomllib.loads(run_file.read_text(encoding="utf-8")).get("data", {})
    path = path or data.get("tokenizer")
    if path is None:
        raise ConfigError(
            "--tokenizer is needed: the checkpoint is not in a run directory whose config.toml "
            "names one"
        )
    tokenizer, tokenizer_info = load_tokenizer(path, end_of_document=data.get("end_of_document"))
    if info.tokenizer is not None and tokenizer_info.digest != info.tokenizer:
        raise ConfigError(
            f"the tokenizer {path} is not the one the model was trained with (digests "
            f"{tokenizer_info.digest} and {info.tokenizer})"
        )
    if tokenizer_info.vocab_size > info.vocab_size:
        raise ConfigError(
            f"the tokenizer {path} has {tokenizer_info.vocab_size} ids, the model "
            f"{info.vocab_size}: it belongs to another model"
        )
    return tokenizer, tokenizer_info


class FrozenModel:
    """Hold this rank's part of a model, with the weights of a checkpoint.

    Construction is collective over the world. In shapes, S is the number of tokens, B of sequences,
    V the true vocabulary size.

    Args:
        folder: Folder of the checkpoint.
        info: Its description.
        groups: Process groups.
        parallel: Tensor- and pipeline-parallel sizes. Sequence parallelism and virtual stages must
            be off.
        precision: "bf16" or "fp32": type of weights and activations.
        sequence_length: Longest sequence.
    """

    def __init__(
        self,
        folder: Path,
        info: CheckpointInfo,
        groups: Groups,
        parallel: ParallelSection,
        *,
        precision: str,
        sequence_length: int,
    ) -> None:
        assert not parallel.sequence_parallel
        assert parallel.virtual_pipeline == 1
        self.groups, self.vocab_size = groups, info.vocab_size
        self.model: ModelSection = info.model_section()
        self.config = transformer_config(self.model, parallel, groups.platform, precision=precision)
        (self.chunk,) = build_chunks(
            self.model,
            self.config,
            groups,
            vocab_size=info.vocab_size,
            sequence_length=sequence_length,
        )
        load_weights(folder, [self.chunk], setting="checkpoint")
        self.chunk.requires_grad_(False)
        self.chunk.eval()

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, start: int = 0, cache: KeyValueCache | None = None
    ) -> Tensor | None:
        """Return the final hidden states.

        Args:
            tokens: Ids, int64 [B, S], the same on every rank of the replica.
            start: Position of the first token.
            cache: Keys and values of the tokens before. S must be 1 unless it is empty.

        Returns:
            [S, B, H] on the last stage, else None. With a cache only the last position, [1, B, H].

        Collectives:
            Point-to-point messages along the pipeline group.
        """
        batch_size, length = tokens.shape
        self.chunk.set_input_tensor(self._receive(length, batch_size, tokens.device))
        positions = torch.arange(start, start + length, device=tokens.device)
        context: dict[str, Any] = (
            {}
            if cache is None
            else {"inference_context": cache.context, "runtime_gather_output": True}
        )
        output: Tensor = self.chunk(
            input_ids=tokens,
            position_ids=positions.expand(batch_size, length),
            attention_mask=None,
            **context,
        )
        if cache is not None:
            cache.context.sequence_len_offset += length
        if self.groups.is_last_stage:
            return output
        dist.send(output.contiguous(), dst=self._neighbor(1), group=self.groups.collection.pp)
        return None

    def _receive(self, length: int, batch_size: int, device: torch.device) -> Tensor | None:
        """Receive the hidden states [S, B, H] of the stage before; None on the first stage."""
        if self.groups.pipeline_rank == 0:
            return None
        received = torch.empty(
            length,
            batch_size,
            self.config.hidden_size,
            dtype=self.config.params_dtype,
            device=device,
        )
        dist.recv(received, src=self._neighbor(-1), group=self.groups.collection.pp)
        return received

    def weight(self) -> Tensor:
        """Return this rank's output weight [V/tp, H]. Call it on the last stage."""
        return output_weight(self.chunk)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, fp32 [S, B, V], of hidden states [S, B, H], on the last stage.

        Collectives:
            One all-gather over the tensor group.
        """
        shard = hidden.float() @ self.weight().float().T
        shards = all_gather(shard, self.groups.tp)
        return torch.cat(list(shards), dim=-1)[..., : self.vocab_size]

    def _neighbor(self, offset: int) -> int:
        group = self.groups.collection.pp
        return dist.get_global_rank(group, self.groups.pipeline_rank + offset)


class KeyValueCache:
    """Hold keys and values of a batch that is being continued, in megatron-core's static buffers.

    Args:
        batch_size: Sequences of the batch.
        max_length: Longest sequence, prompt included.
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.context = StaticInferenceContext(batch_size, max_length)
