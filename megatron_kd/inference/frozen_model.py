"""A checkpoint's model as it is, to be read from: logits, losses on held-out tokens, continuations. Never trained.

Stages hand hidden states on by plain point-to-point messages: one forward pass at a time needs no schedule.
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
    """The layout of a frozen model. ConfigError, the same on every rank, where the model or the world does not divide by it."""
    model = info.model_section()
    if min(tensor, pipeline) < 1:
        raise ConfigError(f"--tensor ({tensor}) and --pipeline ({pipeline}) must be at least 1")
    for name, size, option, divisor in model.indivisible_sizes(tensor=tensor, stages=pipeline):
        raise ConfigError(
            f"the model's {name} ({size}) must be a multiple of --{option} ({divisor})"
        )
    if world_size % (tensor * pipeline):
        raise ConfigError(
            f"{world_size} processes cannot be split into --tensor x --pipeline = {tensor * pipeline}"
        )
    return ParallelSection(tensor=tensor, pipeline=pipeline)


def tokenizer_of(
    folder: Path, info: CheckpointInfo, given: Path | None
) -> tuple[Any, TokenizerInfo]:
    """The tokenizer of a checkpoint: the one given, or that of its run. ConfigError unless its vocabulary is the model's."""
    run = folder.parent.parent / "config.toml"
    data = tomllib.loads(run.read_text(encoding="utf-8")).get("data", {}) if run.is_file() else {}
    path = given or data.get("tokenizer")
    if path is None:
        raise ConfigError(
            "--tokenizer is needed: the checkpoint is not in a run directory whose config.toml names one"
        )
    tokenizer, found = load_tokenizer(path, end_of_document=data.get("end_of_document"))
    if info.tokenizer is not None and found.digest != info.tokenizer:
        raise ConfigError(
            f"the tokenizer {path} is not the one the model was trained with (digests {found.digest} and {info.tokenizer})"
        )
    if found.vocab_size > info.vocab_size:
        raise ConfigError(
            f"the tokenizer {path} has {found.vocab_size} ids, the model {info.vocab_size}: it belongs to another model"
        )
    return tokenizer, found


class FrozenModel:
    """This rank's part of a model, with the weights of a checkpoint. S tokens, B sequences, V true vocabulary.

    Construction is collective over the world. parallel: tensor and pipeline sizes; sequence parallelism and virtual stages must
    be off.
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
        load_weights(folder, [self.chunk], what="checkpoint")
        self.chunk.requires_grad_(False)
        self.chunk.eval()

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, start: int = 0, cache: KeyValueCache | None = None
    ) -> Tensor | None:
        """Final hidden states of tokens [B, S] at positions start ... start + S - 1: [S, B, H] on the last stage, else None.

        With a cache they continue what it holds (S must be 1 unless it is empty), and only those of the last position, [1, B, H],
        come back. Messages along the pipeline group.
        """
        batch, length = tokens.shape
        if self.groups.pipeline_rank > 0:
            received = torch.empty(
                length,
                batch,
                self.config.hidden_size,
                dtype=self.config.params_dtype,
                device=tokens.device,
            )
            dist.recv(received, src=self._neighbour(-1), group=self.groups.collection.pp)
            self.chunk.set_input_tensor(received)
        else:
            self.chunk.set_input_tensor(None)
        positions = torch.arange(start, start + length, device=tokens.device).expand(batch, length)
        context: dict[str, Any] = (
            {}
            if cache is None
            else {"inference_context": cache.context, "runtime_gather_output": True}
        )
        out: Tensor = self.chunk(
            input_ids=tokens, position_ids=positions, attention_mask=None, **context
        )
        if cache is not None:
            cache.context.sequence_len_offset += length
        if self.groups.is_last_stage:
            return out
        dist.send(out.contiguous(), dst=self._neighbour(1), group=self.groups.collection.pp)
        return None

    def weight(self) -> Tensor:
        """[V/tp, H] of the output head; on the last stage."""
        return output_weight(self.chunk)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [S, B, V] of hidden states [S, B, H], on the last stage. One all-gather over the tensor group."""
        mine = hidden.float() @ self.weight().float().T
        shards = all_gather(mine, self.groups.tp)
        return torch.cat(list(shards), dim=-1)[..., : self.vocab_size]

    def _neighbour(self, step: int) -> int:
        group = self.groups.collection.pp
        return dist.get_global_rank(group, self.groups.pipeline_rank + step)


class KeyValueCache:
    """Keys and values of a batch that is being continued, in megatron-core's static buffers."""

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.context = StaticInferenceContext(batch_size, max_length)
