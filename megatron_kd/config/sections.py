"""The sections of a run file: one frozen pydantic model each, checked for itself.

Relations between sections are checked in `run.py`. No module here imports torch, so that a run file can be
checked on a login node in milliseconds. Every field says its unit and range: `--help` prints these texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.divergences import DivergenceName, sparse_problem
from megatron_kd.config.model import ModelSection as ModelSection
from megatron_kd.config.model import Section as Section


class TeacherParallelSection(Section):
    """How an online teacher is laid out over the same ranks; the data-parallel size is what remains. Unset: as the student."""

    tensor: int | None = Field(default=None, gt=0, description="Tensor-parallel size of the teacher. Unset: the student's.")
    pipeline: int | None = Field(default=None, gt=0, description="Pipeline stages of the teacher. Unset: the student's.")


class TeacherSection(Section):
    """Where the distillation targets come from."""

    source: Literal["none", "online", "cached", "huggingface"] = Field(
        default="none",
        description='"none": plain pretraining. "online": a frozen teacher runs forward in every step. "cached": its targets were stored '
        'by tools/cache_teacher.py, or by itself while it trained ([capture]). "huggingface": as online, a local model folder that '
        "transformers runs.",
    )
    checkpoint: Path | None = Field(
        default=None,
        description="Checkpoint of the teacher: a run directory, its checkpoints folder, or one step-* folder. Needed for online; with "
        "cached, the cache must have been made by it. huggingface: a local folder with config.json and safetensors.",
    )
    tokenizer: Path | None = Field(
        default=None,
        description="huggingface: the teacher's tokenizer, whose vocabulary must be that of data.tokenizer. Unset: the one in its folder.",
    )
    shard_parameters: Literal["auto", "zero3", "none"] = Field(
        default="auto",
        description="huggingface: zero3 spreads the teacher's weights over all ranks (DeepSpeed ZeRO-3); none: whole on each rank; auto: "
        "zero3 where deepspeed is installed and there are ranks to spread over.",
    )
    offload: bool = Field(default=False, description="huggingface with zero3: keep the spread weights in CPU memory between uses.")
    cache: str | None = Field(default=None, description="Folder of the cache, or a URL that fsspec knows (s3://...). Needed for cached.")
    on_miss: Literal["error", "online"] = Field(
        default="error",
        description='cached: what to do about a sample that the cache does not hold. "online": run teacher.checkpoint for it.',
    )
    parallel: TeacherParallelSection = Field(
        default=TeacherParallelSection(),
        description="online: a layout of the teacher's own, over the same ranks.",
    )
    micro_batch_size: int | None = Field(
        default=None, gt=0, description="online: sequences in one forward pass of the teacher. Unset: batch.micro_batch_size."
    )

    @property
    def has_own_layout(self) -> bool:
        """Whether anything about how the teacher runs differs, or may differ, from how the student does."""
        return (self.parallel.tensor, self.parallel.pipeline, self.micro_batch_size) != (None, None, None)

    @model_validator(mode="after")
    def _check(self) -> TeacherSection:
        if self.has_own_layout and self.source != "online" and self.on_miss != "online":
            raise ValueError(f'teacher.parallel and teacher.micro_batch_size are for an online teacher, not for source = "{self.source}"')
        if self.source in ("online", "huggingface") and self.checkpoint is None:
            raise ValueError(f'source = "{self.source}" needs teacher.checkpoint')
        if self.source == "cached" and self.cache is None:
            raise ValueError('source = "cached" needs teacher.cache')
        if self.source == "cached" and self.on_miss == "online" and self.checkpoint is None:
            raise ValueError('on_miss = "online" needs teacher.checkpoint')
        return self


AlphaSchedule = Literal["constant", "linear_up", "linear_down", "wsd"]


class DistillSection(Section):
    """The distillation loss: total = (1 - alpha) * ce + alpha * kd + z_loss * logsumexp^2, nats per token."""

    alpha: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Largest weight of the distillation loss, in [0, 1]. Unused without a teacher.",
    )
    alpha_schedule: AlphaSchedule = Field(
        default="constant",
        description="Alpha over the run: constant; linear_up 0 to alpha; linear_down alpha to 0; wsd (linear warm-up, stable, cosine decay "
        "to 0).",
    )
    alpha_warmup_fraction: float = Field(default=0.1, ge=0, le=1, description="wsd: share of the steps that warm alpha up, in [0, 1].")
    alpha_decay_fraction: float = Field(default=0.01, ge=0, le=1, description="wsd: share of the steps that decay alpha, in [0, 1].")
    divergence: DivergenceName = Field(
        default="forward_kl",
        description="What is compared with the teacher (formulas: losses/divergence_terms.py). forward_kl: KL(teacher || student). "
        "All but forward_kl take tail bucket, some of them renormalize; mse_logits needs dense.",
    )
    js_beta: float = Field(default=0.5, gt=0, lt=1, description="jensen_shannon: weight of the teacher in the mixture, in (0, 1).")
    skew: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="skew_kl: share of the teacher in the mixture; skew_reverse_kl: of the student; in (0, 1).",
    )
    ab_alpha: float = Field(default=0.2, ge=0, description="alpha_beta: exponent of the teacher's probabilities, >= 0.")
    ab_beta: float = Field(default=0.7, ge=0, description="alpha_beta: exponent of the student's probabilities, >= 0.")
    dense: bool = Field(
        default=False,
        description="Compare the whole distributions: the teacher's final hidden states are kept for the step in place of sparse targets, "
        "[tokens per step on this rank] x [teacher's hidden_size] values of train.precision, of which sequence_parallel holds its "
        "slice. Online teacher only.",
    )
    temperature: float = Field(default=1.0, gt=0, description="Divides the logits of teacher and student in the distillation loss, > 0.")
    temperature_squared: bool = Field(default=False, description="Multiply the distillation loss by temperature^2.")
    top_k: int = Field(default=64, gt=0, description="Teacher entries kept per token over the whole vocabulary, at most vocab_size.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Then keep the smallest prefix whose teacher mass (at temperature) reaches top_p, in (0, 1].",
    )
    min_k: int = Field(default=1, gt=0, description="Never keep fewer entries than this, at most top_k.")
    num_draws: int | None = Field(
        default=None,
        gt=0,
        description="Draw this many ids per token at random from the teacher (at temperature) in place of taking the likeliest: unbiased. "
        "Unset: top_k, top_p. The draws depend on train.seed, the sample and the position alone.",
    )
    tail: Literal["drop", "renormalize", "bucket", "uniform"] = Field(
        default="renormalize",
        description="Teacher mass outside the kept entries: drop it; rescale the kept mass to 1; one bucket on both sides; spread evenly "
        "over the other ids.",
    )
    z_loss: float = Field(default=0.0, ge=0, description="Coefficient of the squared logsumexp of the student, >= 0.")
    head_schedule: Literal["auto", "save", "chunk", "direct", "recompute"] = Field(
        default="auto",
        description="When the output head forms its gradients (losses/head.py). auto: save where all logits are few, else chunk. direct: "
        "least memory at full speed. recompute: least memory of all, one product more.",
    )
    chunk_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens whose logits exist at one time in the output head. Unset: chosen from the vocabulary shard, never from free "
        "memory.",
    )

    @model_validator(mode="after")
    def _check(self) -> DistillSection:
        if self.min_k > self.top_k:
            raise ValueError(f"min_k ({self.min_k}) must be at most top_k ({self.top_k})")
        if self.num_draws is not None and self._changed("top_k", "top_p", "min_k"):
            raise ValueError("num_draws draws at random: leave top_k, top_p and min_k unset, or unset num_draws")
        if self.num_draws is not None and self.tail in ("bucket", "uniform"):
            raise ValueError(f'tail = "{self.tail}" needs the mass outside the kept ids, which draws do not know: use "renormalize"')
        self._check_divergence()
        warmup, decay = self.alpha_warmup_fraction, self.alpha_decay_fraction
        if warmup + decay > 1:
            raise ValueError(f"alpha_warmup_fraction ({warmup}) + alpha_decay_fraction ({decay}) must be at most 1")
        return self

    def _check_divergence(self) -> None:
        if self.dense:
            if self._changed("top_k", "top_p", "min_k", "num_draws", "tail"):
                raise ValueError("dense compares whole distributions: leave top_k, top_p, min_k, num_draws and tail unset")
            if self.head_schedule == "recompute":
                raise ValueError('dense cannot be served by head_schedule = "recompute": the teacher\'s logits exist once')
            return
        sampled = self.num_draws is not None
        problem = sparse_problem(self.divergence, tail=self.tail, sampled=sampled, ab_alpha=self.ab_alpha, ab_beta=self.ab_beta)
        if problem is not None:
            raise ValueError(f"{problem} (dense = true)" if "dense teacher" in problem else problem)

    def _changed(self, *names: str) -> bool:
        """Whether any of these differs from its default: a dumped run file writes all of them."""
        fields = type(self).model_fields
        return any(getattr(self, name) != fields[name].default for name in names)


class DataSection(Section):
    """Token datasets in Megatron's .bin/.idx format, and the tokenizer that made them."""

    tokenizer: Path | None = Field(
        default=None,
        description="SentencePiece .model, tokenizer.json or its folder, or .tiktoken file. The digest of its vocabulary is compared with "
        "the teacher's and the data's, its size gives model.vocab_size.",
    )
    end_of_document: str | None = Field(
        default=None, description="Token that ends documents, as given to tools/preprocess_data.py. Unset: the tokenizer's own."
    )
    train: tuple[str, ...] = Field(min_length=1, description="Prefixes of the training data (path without .bin/.idx).")
    train_weights: tuple[float, ...] | None = Field(
        default=None,
        description="Sampling weight of each train prefix, > 0, any scale. Unset: in proportion to their tokens.",
    )
    valid: dict[str, str] = Field(default_factory=dict, description="Validation sets: name = prefix. Each is reported on its own.")
    index_cache: Path | None = Field(
        default=None,
        description="Folder for the sample order's index files, seen by all ranks. Unset: run.directory/index_cache.",
    )
    mask_end_of_document: bool = Field(default=False, description="No loss for predicting what follows an end-of-document token.")
    document_attention: Literal["across", "within"] = Field(
        default="across",
        description='What a token sees of its sequence. "across": all before it. "within": its own document only, positions counted from '
        "its start; documents are those of the .idx file.",
    )

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        weights = self.train_weights
        if weights is not None and (len(weights) != len(self.train) or min(weights) <= 0):
            raise ValueError(f"train_weights ({list(weights)}) needs one weight > 0 for each of data.train's {len(self.train)} entries")
        return self


class BatchSection(Section):
    """Sizes of one step, in sequences and tokens."""

    global_batch_size: int = Field(
        gt=0,
        description="Sequences per step over all ranks. Multiple of micro_batch_size * data-parallel size.",
    )
    micro_batch_size: int = Field(gt=0, description="Sequences per forward pass of one data-parallel rank.")
    sequence_length: int = Field(gt=0, description="Tokens per sequence. Multiple of parallel.tensor under sequence_parallel.")


class OptimizerSection(Section):
    """Adam with decoupled weight decay, and its learning-rate schedule (a function of the step alone)."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    min_learning_rate: float = Field(default=0.0, ge=0, description="Learning rate at the end of the schedule, at most learning_rate.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="Learning rate after warm-up: cosine or linear to min_learning_rate, constant, or wsd (stable, then decay_steps of "
        "decay).",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    decay_steps: int = Field(default=0, ge=0, description="wsd: steps of cosine decay at the end.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's first moment decay.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="Adam's second moment decay.")
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled weight decay; never on norms and biases.")
    clip_grad: float = Field(default=1.0, ge=0, description="Global gradient norm is clipped to this; 0 turns clipping off.")
    distributed: bool = Field(default=False, description="Shard the optimizer state over data-parallel ranks (ZeRO-1).")

    @model_validator(mode="after")
    def _check(self) -> OptimizerSection:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate ({self.min_learning_rate}) must be at most learning_rate ({self.learning_rate})")
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError('schedule = "wsd" needs optimizer.decay_steps > 0')
        return self


class ParallelSection(Section):
    """How the student is laid out over the ranks; the data-parallel size is what remains."""

    tensor: int = Field(default=1, gt=0, description="Tensor-parallel size: ranks that share each layer.")
    pipeline: int = Field(default=1, gt=0, description="Pipeline-parallel size: stages.")
    virtual_pipeline: int = Field(default=1, gt=0, description="Model chunks per stage (interleaved schedule). Above 1 needs pipeline > 1.")
    sequence_parallel: bool = Field(
        default=False,
        description="Split activations outside tensor-parallel regions over the tensor group. Needs tensor > 1.",
    )
    overlap_grad_reduce: bool = Field(default=False, description="Reduce gradients while the backward pass runs.")
    overlap_param_gather: bool = Field(
        default=False,
        description="Gather updated weights while the forward pass runs. Needs optimizer.distributed and overlap_grad_reduce.",
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelSection:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"virtual_pipeline ({self.virtual_pipeline}) above 1 needs pipeline > 1")
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
    max_nonfinite_steps: int = Field(default=10, ge=0, description="skip: stop after this many skipped steps.")
    evaluate_interval: int = Field(default=0, ge=0, description="Steps between evaluations on data.valid; 0: only at the end.")
    evaluate_batches: int = Field(default=8, gt=0, description="Global batches per validation set and evaluation.")
    timeout_seconds: float = Field(default=600.0, gt=0, description="A collective that waits longer than this stops the run, seconds.")


class CheckpointSection(Section):
    """Saving and starting."""

    interval: int = Field(default=0, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_last: int = Field(default=2, gt=0, description="Newest checkpoints kept.")
    initialize_from: Path | None = Field(
        default=None,
        description="Start from the weights of this checkpoint (step 0, fresh optimizer). "
        "Ignored once the run has a checkpoint of its own.",
    )
    resume: bool = Field(
        default=True,
        description="Continue from the newest checkpoint in run.directory. False refuses a directory that has one.",
    )


class TelemetrySection(Section):
    """What is measured and written."""

    log_interval: int = Field(default=1, gt=0, description="Steps between rows of metrics.jsonl and TensorBoard.")
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

    directory: Path = Field(description="Everything the run writes: config.toml, metrics.jsonl, status.json, tensorboard/, checkpoints/.")
