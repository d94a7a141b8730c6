"""Distil from a Hugging Face model folder that transformers runs forward in every step."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.models.huggingface.config_json import model_from_config
from megatron_kd.storage.json_files import read_json
from megatron_kd.storage.sampled_digests import sampled_folder_digest
from megatron_kd.teacher.source import CHECKPOINT_KEY, TeacherInputs, TeacherSource

if TYPE_CHECKING:
    from megatron_kd.parallel.groups import Groups
    from megatron_kd.teacher.teacher import Teacher


class Source(TeacherSource):
    """Source of a teacher in a local Hugging Face folder."""

    def read_model(self) -> ModelSection | None:
        """Return the shape of a model of a known family, None for another."""
        folder = self.config.teacher.checkpoint
        assert folder is not None
        try:
            content = read_json(folder / "config.json", setting=CHECKPOINT_KEY)
            return model_from_config(content, setting=CHECKPOINT_KEY)
        except ConfigError:
            return None

    def check_inputs(
        self, vocab_size: int, tokenizer_digest: str | None, world_size: int
    ) -> TeacherInputs:
        """Check the folder and prove that its ids are those of this run.

        With a digest, the teacher's own tokenizer must have the same vocabulary, and rows of its
        embedding past vocab_size are padding. Without one there is nothing to compare, and the
        sizes must be equal.

        Raises:
            ConfigError: the folder holds no usable model, or its ids may differ.
        """
        if self.config.data.document_attention == "within":
            raise ConfigError(
                'teacher.source = "huggingface" reads a sample as one text: set '
                'data.document_attention = "across", or convert the teacher '
                "(tools/convert_checkpoint.py)"
            )
        folder = self._check_folder()
        _check_vocabulary_size(folder, vocab_size, tokenizer_digest)
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError(
                'teacher.source = "huggingface" needs transformers: '
                "pip install 'megatron-kd[huggingface]'"
            )
        use_zero3(self.config.teacher.shard_parameters, 1)
        if tokenizer_digest is not None:
            path = self.config.teacher.tokenizer or _tokenizer_in(folder)
            _check_tokenizer(path, tokenizer_digest)
        return TeacherInputs(vocab_size, tokenizer_digest, folder, model=self.read_model())

    def _check_folder(self) -> Path:
        folder = self.config.teacher.checkpoint
        assert folder is not None
        if not folder.is_dir():
            raise ConfigError(
                f"{CHECKPOINT_KEY}: {folder} is not a folder (a Hugging Face teacher is read from "
                "a local folder; nothing is downloaded)"
            )
        read_json(folder / "config.json", setting=CHECKPOINT_KEY)
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"{CHECKPOINT_KEY}: {folder} holds no .safetensors file (pickled weights are never "
                "opened)"
            )
        return folder

    def run_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return a digest of sampled blocks of the folder's files."""
        assert inputs.folder is not None
        return {"teacher.checkpoint": sampled_folder_digest(inputs.folder)}

    def weights_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return nothing, so that the names of captured caches stay those of earlier versions."""
        return {}

    def weights_digest(self, inputs: TeacherInputs) -> str | None:
        """Return the digest of the model's files; the folder may hold anything beside them."""
        from megatron_kd.teacher.runtime.online_teacher import digest_on_rank_zero

        assert inputs.folder is not None
        return digest_on_rank_zero(inputs.folder, ("config.json", "*.safetensors"))

    def build(self, inputs: TeacherInputs, groups: Groups) -> Teacher:
        """See TeacherSource."""
        from megatron_kd.teacher.runtime.huggingface_teacher import build_huggingface_teacher

        zero3 = use_zero3(self.config.teacher.shard_parameters, groups.world_size)
        return build_huggingface_teacher(self.config, inputs, groups, zero3=zero3)

    def build_for_extraction(self, inputs: TeacherInputs, groups: Groups) -> Teacher:
        """See TeacherSource."""
        return self.build(inputs, groups)


def _check_vocabulary_size(folder: Path, vocab_size: int, tokenizer_digest: str | None) -> None:
    size = read_json(folder / "config.json", setting=CHECKPOINT_KEY).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{CHECKPOINT_KEY}: {folder / 'config.json'} does not say vocab_size")
    if tokenizer_digest is None and size != vocab_size:
        raise ConfigError(
            f"{CHECKPOINT_KEY}: {folder} has a vocabulary of {size} ids, this run has "
            f"{vocab_size}: set data.tokenizer, which proves which ids are the same, or use the "
            "same vocabulary"
        )
    if size < vocab_size:
        raise ConfigError(
            f"{CHECKPOINT_KEY}: {folder} has a vocabulary of {size} ids, this run has "
            f"{vocab_size}: use the same tokenizer"
        )


def _check_tokenizer(path: Path, digest: str) -> None:
    """Raise ConfigError if the teacher's tokenizer has another vocabulary than the run's."""
    try:
        teacher_digest = load_tokenizer(path)[1].digest
    except ConfigError as error:
        raise ConfigError(
            "teacher.tokenizer: the teacher's ids cannot be compared with those of data.tokenizer "
            f"({error}): name its tokenizer"
        ) from error
    if teacher_digest != digest:
        raise ConfigError(
            f"{CHECKPOINT_KEY}: the teacher's tokenizer {path} has another vocabulary than "
            f"data.tokenizer (digests {teacher_digest} and {digest}): their ids do not mean the "
            "same, whatever the sizes"
        )


def _tokenizer_in(folder: Path) -> Path:
    """Return the SentencePiece model of a folder, or the folder itself."""
    model = folder / "tokenizer.model"
    return model if model.is_file() and not (folder / "tokenizer.json").is_file() else folder


def use_zero3(shard_parameters: str, world_size: int) -> bool:
    """Return True if the teacher's weights are spread over all ranks.

    Raises:
        ConfigError: teacher.shard_parameters asks for it and deepspeed is not installed.
    """
    installed = importlib.util.find_spec("deepspeed") is not None
    if shard_parameters == "zero3" and not installed:
        raise ConfigError(
            'teacher.shard_parameters = "zero3" needs deepspeed, which is not installed: '
            "DS_BUILD_OPS=0 pip install --no-build-isolation 'megatron-kd[deepspeed]', or set it "
            'to "none"'
        )
    return shard_parameters == "zero3" or (
        shard_parameters == "auto" and installed and world_size > 1
    )
