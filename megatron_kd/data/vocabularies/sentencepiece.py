"""Read SentencePiece .model files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from megatron_kd.data.vocabularies.vocabulary import Vocabulary


class SentencePieceVocabulary(Vocabulary):
    """Encode text with a SentencePiece model."""

    library: ClassVar[str] = "sentencepiece"
    description: ClassVar[str] = "a SentencePiece .model file"
    file_names: ClassVar[tuple[str, ...]] = ("tokenizer.model", "*.model")

    def __init__(self, model: bytes) -> None:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        definitions: Any = sentencepiece_model_pb2  # generated at import; type checkers see nothing
        proto = definitions.ModelProto.FromString(model)
        pieces = [piece.piece for piece in proto.pieces]
        special = frozenset(
            i
            for i in range(len(pieces))
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
        )
        tokens = [
            piece_bytes(text, is_byte=processor.is_byte(i), special=i in special)
            for i, text in enumerate(pieces)
        ]
        space_is_known = processor.piece_to_id("▁") not in special
        is_bpe = proto.trainer_spec.model_type == definitions.TrainerSpec.BPE
        splits_at_spaces = is_bpe and space_is_known and _merges_within_words(proto, pieces)
        super().__init__(
            tokens,
            special,
            processor.eos_id() if processor.eos_id() >= 0 else None,
            splits_at_spaces=splits_at_spaces,
            adds_leading_space=bool(proto.normalizer_spec.add_dummy_prefix),
            space_alias="▁",
            caches_words=splits_at_spaces,
            splits_locally=False,
        )
        self._document_processor, self._inner_processor = processor, processor
        if proto.normalizer_spec.add_dummy_prefix:
            proto.normalizer_spec.add_dummy_prefix = False
            self._inner_processor = SentencePieceProcessor()
            self._inner_processor.LoadFromSerializedProto(proto.SerializeToString())

    @classmethod
    def read(cls, file: Path, content: bytes, pattern: str | None) -> Vocabulary | None:
        """Return the vocabulary of a serialised model; see `Vocabulary.read`."""
        try:
            return cls(content)
        except RuntimeError:
            return None

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text; see `Vocabulary.encode_batch`."""
        batch = self._inner_processor.encode(list(texts), num_threads=1)
        return [self._to_bytes(ids) for ids in batch]

    def encode_document(self, text: str) -> bytes:
        """Return the ids of one complete document, its leading space included."""
        return self._to_bytes(self._document_processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids."""
        text: str = self._document_processor.decode([int(index) for index in ids])
        return text


def _merges_within_words(proto: Any, pieces: Sequence[str]) -> bool:
    """Return whether normalisation keeps spaces and no piece has one after its first character."""
    normalizer = proto.normalizer_spec
    keeps_text = normalizer.name == "identity" or not normalizer.precompiled_charsmap
    return bool(
        keeps_text
        and not any("▁" in text.lstrip("▁") or " " in text for text in pieces)
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not proto.trainer_spec.treat_whitespace_as_suffix
    )


def piece_bytes(piece: str, *, is_byte: bool, special: bool = False) -> bytes:
    """Return the bytes of text that a SentencePiece piece stands for.

    Args:
        piece: name of the piece, "▁" for a space.
        is_byte: the piece is a byte written as "<0xHH>".
        special: the piece is a special token, whose name is kept as it is.
    """
    if is_byte:
        return bytes([int(piece[3:5], 16)])
    return piece.encode("utf-8") if special else piece.replace("▁", " ").encode("utf-8")
