"""The sections of a run file: one frozen pydantic model each, checked for itself.

Relations between sections are checked in `run.py`. No module here imports torch, so that a run file can be
checked on a login node in milliseconds. Every field says its unit and range: `--help` prints these texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.distill_section import DistillSection as DistillSection
from megatron_kd.config.model_section import ModelSection as ModelSection
from megatron_kd.config.model_section import Section as Section
from megatron_kd.config.schedules import (
    LEARNING_RATE_SCHEDULES,
    LearningRateScheduleName,
    describe_schedules,
)
from megatron_kd.config.teacher_section import TeacherParallelSection as TeacherParallelSection
from megatron_kd.config.teacher_section import TeacherSection as TeacherSection


class DataSection(Section):
    """Token datasets in Megatron's .bin/.idx format, and the tokenizer that made them."""

    tokenizer: Path | None = Field(
        default=None,
        description="SentencePiece .model, tokenizer.json or its folder, or .tiktoken file. The digest of its vocabulary is compared with "
        "the teacher's and the data's, its size gives model.vocab_size.",
    )
    end_of_document: str | None = Field(
        default=None,
        description="Token that ends documents, as given to tools/preprocess_data.py. Unset: the tokenizer's own.",
    )
    train: tuple[str, ...] = Field(
        min_length=1, description="Prefixes of the training data (path without .bin/.idx)."
    )
    train_weights: tuple[float, ...] | None = Field(
        default=None,
        description="Sampling weight of each train prefix, > 0, any scale. Unset: in proportion to their tokens.",
    )
    valid: dict[str, str] = Field(
        default_factory=dict,
        description="Validation sets: name = prefix. Each is reported on its own.",
    )
    index_cache: Path | None = Field(
        default=None,
        description="Folder for the sample order's index files, seen by all ranks. Unset: run.directory/index_cache.",
    )
    mask_end_of_document: bool = Field(
        default=False, description="No loss for predicting what follows an end-of-document token."
    )
    document_attention: Literal["across", "within"] = Field(
        default="across",
        description='What a token sees of its sequence. "across": all before it. "within": its own document only, positions counted from '
        "its start; documents are those of the .idx file.",
    )

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        weights = self.train_weights
        if weights is not None and (len(weights) != len(self.train) or min(weights) <= 0):
            raise ValueError(
                f"train_weights ({list(weights)}) needs one weight > 0 for each of data.train's {len(self.train)} entries"
            )
        return self


class BatchSection(Section):
    """Sizes of one step, in sequences and tokens."""

    global_batch_size: int = Field(
        gt=0,
        description="Sequences per step over all ranks. Multiple of micro_batch_size * data-parallel size.",
    )
    micro_batch_size: int = Field(
        gt=0, description="Sequences per forward pass of one data-parallel rank."
    )
    sequence_length: int = Field(
        gt=0,
        description="Tokens per sequence. Multiple of parallel.tensor under sequence_parallel.",
    )


class OptimizerSection(Section):
    """Adam with decoupled weight decay, and its learning-rate schedule (a function of the step alone)."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    min_learning_rate: float = Field(
        default=0.0,
        ge=0,
        description="Learning rate at the end of the schedule, at most learning_rate.",
    )
    schedule: LearningRateScheduleName = Field(
        default="cosine",
        description=f"Learning rate after warm-up. {describe_schedules(LEARNING_RATE_SCHEDULES)}.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    decay_steps: int = Field(default=0, ge=0, description="wsd: steps of cosine decay at the end.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's first moment decay.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="Adam's second moment decay.")
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay; never on norms and biases."
    )
    clip_grad: float = Field(
        default=1.0,
        ge=0,
        description="Global gradient norm is clipped to this; 0 turns clipping off.",
    )
    distributed: bool = Field(
        default=False, description="Shard the optimizer state over data-parallel ranks (ZeRO-1)."
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerSection:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) must be at most learning_rate ({self.learning_rate})"
            )
        if LEARNING_RATE_SCHEDULES[self.schedule].uses_decay_steps and self.decay_steps == 0:
            raise ValueError(f'schedule = "{self.schedule}" needs optimizer.decay_steps > 0')
        return self


class ParallelSection(Section):
    """How the student is laid out over the ranks; the data-parallel size is what remains."""

    tensor: int = Field(
        default=1, gt=0, description="Tensor-parallel size: ranks that share each layer."
    )
    pipeline: int = Field(default=1, gt=0, description="Pipeline-parallel size: stages.")
    virtual_pipeline: int = Field(
        default=1,
        gt=0,
        description="Model chunks per stage (interleaved schedule). Above 1 needs pipeline > 1.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Split activations outside tensor-parallel regions over the tensor group. Needs tensor > 1.",
    )
    overlap_grad_reduce: bool = Field(
        default=False, description="Reduce gradients while the backward pass runs."
    )
    overlap_param_gather: bool = Field(
        default=False,
        description="Gather updated weights while the forward pass runs. Needs optimizer.distributed and overlap_grad_reduce.",
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelSection:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline ({self.virtual_pipeline}) above 1 needs pipeline > 1"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1")
        return self


class TrainSection(Section):
    """The loop."""

    steps: int = Field(gt=0, description="Optimizer updates in the whole run.")
    seed: int = Field(
        default=1234,
        ge=0,
        lt=2**31,
        description="Seed of weights, data order and dropout. Weights do not depend on the layout.",
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16",
        description="Type of weights and activations; bf16 keeps fp32 main weights and gradients.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto",
        description="auto takes CUDA (NCCL) where there is one, else CPU (gloo).",
    )
    compile_head: bool = Field(
        default=False,
        description="On a CPU, let torch.compile fuse the elementwise parts of the output head: needs a C++ compiler and half a minute.",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="A loss or gradient that is not finite never reaches the weights: stop the run, or skip the step and count it.",
    )
    max_nonfinite_steps: int = Field(
        default=10, ge=0, description="skip: stop after this many skipped steps."
    )
    loss_spike: float | None = Field(
        default=None,
        gt=0,
        description="A step's total_loss this many nats above the median of the last 100 steps is a spike. Unset: nobody looks.",
    )
    on_loss_spike: Literal["warn", "stop"] = Field(
        default="warn",
        description="stop: leave with exit code 93; the last checkpoint is from before the spike.",
    )
    deterministic: bool = Field(
        default=False,
        description="The same run gives the same bits: operations that cannot promise it on a GPU raise an error, slower ones take the "
        "place of others, and an NCCL_ALGO that cannot is refused.",
    )
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Save and leave with exit code 85 this long after the start, minutes: some before a batch system takes the nodes. "
        "Unset: no limit.",
    )
    evaluate_interval: int = Field(
        default=0, ge=0, description="Steps between evaluations on data.valid; 0: only at the end."
    )
    evaluate_batches: int = Field(
        default=8, gt=0, description="Global batches per validation set and evaluation."
    )
    timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description="A collective that waits longer than this stops the run, seconds.",
    )


class CheckpointSection(Section):
    """Saving and starting."""

    interval: int = Field(
        default=0, ge=0, description="Steps between checkpoints; 0: only at the end."
    )
    keep_last: int = Field(
        default=2,
        gt=0,
        description="Newest checkpoints kept; older ones stay as long as none of these has been read back and found right.",
    )
    asynchronous: bool = Field(
        default=False,
        description="Train on while a checkpoint is written. Costs one copy of a rank's state in its CPU memory.",
    )
    timeout_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="Longest time of one rank's part of a save, in seconds; after it the run stops and says which rank writes which file.",
    )
    initialize_from: Path | None = Field(
        default=None,
        description="Start from the weights of this checkpoint (step 0, fresh optimizer). "
        "Ignored once the run has a checkpoint of its own.",
    )
    resume: bool = Field(
        default=True,
        description="Continue from the newest undamaged checkpoint in run.directory. False refuses a directory that has one.",
    )
    allow_changes: bool = Field(
        default=False,
        description="Continue although settings, data or the teacher are others than those that the run began with. What changed is "
        "noted in checkpoints.jsonl. train.steps, layouts and schedules may always change.",
    )


class TelemetrySection(Section):
    """What is measured and written."""

    log_interval: int = Field(
        default=1, gt=0, description="Steps between rows of metrics.jsonl and TensorBoard."
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard event files.")
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Peak of one device for MFU, 1e12 FLOP/s. Unset: known GPUs by name; on CPU a matrix product is timed at start.",
    )
    progress: Literal["auto", "bar", "lines", "off"] = Field(
        default="auto",
        description="auto: a bar on a terminal, sparse lines elsewhere.",
    )


class RunSection(Section):
    """Where the run lives."""

    directory: Path = Field(
        description="Everything the run writes: config.toml, metrics.jsonl, status.json, tensorboard/, checkpoints/."
    )
