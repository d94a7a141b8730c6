"""What can be known to be wrong before ranks talk to each other, or torch is imported: each rank finds it by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_kd.checkpoint.store import (
    CheckpointInfo,
    check_same_model,
    check_same_vocabulary,
    complete_steps,
    find_checkpoint,
    read_info,
    step_folder,
)
from megatron_kd.config import ConfigError, ModelSection, RunConfig
from megatron_kd.data.indexed import check_token_file, packed_length, read_index
from megatron_kd.data.tokenizer import TokenizerInfo, load_tokenizer
from megatron_kd.train.foreign import check_huggingface_teacher, known_shape


@dataclass(frozen=True)
class Inputs:
    """What the checks before the first collective have found."""

    vocab_size: int
    tokenizer: TokenizerInfo | None
    teacher: tuple[Path, CheckpointInfo] | None
    resume: tuple[Path, CheckpointInfo] | None
    initial: Path | None
    huggingface: Path | None = None

    @property
    def teacher_model(self) -> ModelSection | None:
        """Shape of the teacher; None without one, and for one that is not of a family known here."""
        if self.huggingface is not None:
            return known_shape(self.huggingface)
        return self.teacher[1].model_section() if self.teacher is not None else None

    @property
    def digest(self) -> str | None:
        """Digest of the tokenizer's vocabulary."""
        return self.tokenizer.digest if self.tokenizer else None


def checkpoints_folder(config: RunConfig) -> Path:
    """Where this run's checkpoints are."""
    return config.run.directory / "checkpoints"


def check_inputs(config: RunConfig, *, world_size: int) -> Inputs:
    """Check sizes, tokenizer, data and checkpoints. ConfigError with one sentence, the same on every rank; no collective."""
    config.data_parallel_size(world_size)
    tokenizer = None
    if config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)[1]
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"model.vocab_size ({vocab_size}) is smaller than the vocabulary of data.tokenizer ({tokenizer.vocab_size} ids)")
    if (
        (config.teacher.source != "none" or config.capture.directory is not None)
        and config.distill.num_draws is None
        and not config.distill.dense
        and config.distill.top_k > vocab_size
    ):
        raise ConfigError(f"distill.top_k ({config.distill.top_k}) must be at most the vocabulary size ({vocab_size})")
    digest = tokenizer.digest if tokenizer else None
    for prefix in (*config.data.train, *config.data.valid.values()):
        check_token_file(prefix, vocab_size=vocab_size, tokenizer_digest=digest)
        if read_index(prefix).num_tokens < config.batch.sequence_length + 1:
            raise ConfigError(
                f"{prefix} holds {read_index(prefix).num_tokens} tokens, fewer than one sequence of batch.sequence_length + 1 = "
                f"{config.batch.sequence_length + 1}: use more data or a shorter sequence"
            )
        _check_packed(config, prefix)
    teacher = huggingface = None
    if config.teacher.source == "huggingface":
        huggingface = check_huggingface_teacher(config, vocab_size=vocab_size, digest=digest)
    elif config.teacher.source != "none" and config.teacher.checkpoint is not None:
        folder = find_checkpoint(config.teacher.checkpoint, what="teacher.checkpoint")
        teacher = folder, read_info(folder, what="teacher.checkpoint")
        check_same_vocabulary(teacher[1], vocab_size=vocab_size, tokenizer=digest, folder=folder, what="teacher.checkpoint")
        _check_teacher_layout(config, teacher[1].model_section(), folder, world_size)
        window = teacher[1].model_section().window_problem(config.batch.sequence_length)
        if window is not None:
            raise ConfigError(f"teacher.checkpoint: {folder}: batch.sequence_length {window}")
    resume = _checkpoint_to_resume(config, vocab_size, digest)
    initial = None
    if resume is None and config.checkpoint.initialize_from is not None:
        initial = find_checkpoint(config.checkpoint.initialize_from, what="checkpoint.initialize_from")
        info = read_info(initial, what="checkpoint.initialize_from")
        check_same_model(info, config.model, vocab_size=vocab_size, tokenizer=digest, folder=initial, what="checkpoint.initialize_from")
    return Inputs(vocab_size, tokenizer, teacher, resume, initial, huggingface)


def _check_teacher_layout(config: RunConfig, model: ModelSection, folder: Path, world_size: int) -> None:
    """ConfigError where the teacher cannot be cut as the run file says: by its own sizes, or by the student's."""
    if config.teacher.source == "cached" and config.teacher.on_miss != "online":
        return
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    if config.teacher.has_own_layout:
        tensor, pipeline, _ = config.teacher_layout(world_size)
    cut = [
        (name, size, "tensor", tensor)
        for name, size in (
            ("num_attention_heads", model.num_attention_heads),
            ("num_query_groups", model.num_query_groups or model.num_attention_heads),
            ("ffn_hidden_size", model.ffn_hidden_size),
            ("vocab_size_multiple", model.vocab_size_multiple),
        )
    ]
    for name, size, by, ranks in [*cut, ("num_layers", model.num_layers, "pipeline", pipeline)]:
        if size % ranks:
            raise ConfigError(
                f"teacher.checkpoint: {folder} has {name} = {size}, which {ranks} {by}-parallel ranks cannot share: "
                f"set teacher.parallel.{by} to a divisor of {size}"
            )


def _check_packed(config: RunConfig, prefix: str) -> None:
    """ConfigError where packed conversations would be cut apart, or would see each other."""
    length = packed_length(prefix)
    if length is not None and length != config.batch.sequence_length:
        raise ConfigError(
            f"{prefix} holds conversations packed into samples of {length} tokens: set batch.sequence_length to that, or make it again "
            f"with --sequence-length {config.batch.sequence_length}"
        )
    if length is not None and config.data.document_attention != "within":
        raise ConfigError(f'{prefix} holds several conversations in each sample: set data.document_attention = "within"')


def _checkpoint_to_resume(config: RunConfig, vocab_size: int, digest: str | None) -> tuple[Path, CheckpointInfo] | None:
    steps = complete_steps(checkpoints_folder(config))
    if not steps:
        return None
    if not config.checkpoint.resume:
        raise ConfigError(
            f"run.directory {config.run.directory} already holds a checkpoint of step {steps[-1]}: "
            "choose another directory, or set checkpoint.resume = true to continue it"
        )
    folder = step_folder(checkpoints_folder(config), steps[-1])
    info = read_info(folder, what="run.directory")
    check_same_model(info, config.model, vocab_size=vocab_size, tokenizer=digest, folder=folder, what="run.directory")
    if info.distributed_optimizer != config.optimizer.distributed:
        raise ConfigError(
            f"run.directory: {folder} was saved with optimizer.distributed = {str(info.distributed_optimizer).lower()}: "
            "continue with the same"
        )
    return folder, info
