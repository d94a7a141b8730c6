"""Declare the [data] section of a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.sections.section import Section


class DataSection(Section):
    """Choose token datasets in Megatron's .bin/.idx format, and the tokenizer that made them."""

    tokenizer: Path | None = None
    """Tokenizer: a SentencePiece .model file, a tokenizer.json or its folder, or a .tiktoken file.
    The digest of its vocabulary must match that of the data and of the teacher. Its size sets
    model.vocab_size where that key is unset.
    """
    end_of_document: str | None = None
    """Token that ends a document, as passed to tools/preprocess_data.py. Unset: the end-of-text
    token that the tokenizer names.
    """
    train: tuple[str, ...] = Field(min_length=1)
    """Prefixes of the training data (path without .bin/.idx)."""
    train_weights: tuple[float, ...] | None = None
    """Sampling weight of each entry of data.train, > 0; only their ratios matter. Unset:
    proportional to the number of tokens.
    """
    valid: dict[str, str] = Field(default_factory=dict)
    """Validation sets, name = prefix. The loss of each is reported separately."""
    index_cache: Path | None = None
    """Folder for the index files of the sample order; all ranks must see it. Unset:
    run.directory/index_cache.
    """
    mask_end_of_document: bool = False
    """Ignore the loss at end-of-document tokens, which predict the first token of the next
    document.
    """
    document_attention: Literal["across", "within"] = "across"
    """Tokens that attention can see. "across": all earlier tokens of the sequence. "within":
    earlier tokens of the same document; positions restart at each document. The .idx file marks the
    documents.
    """

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        weights = self.train_weights
        if weights is not None and (len(weights) != len(self.train) or min(weights) <= 0):
            raise ValueError(
                f"train_weights ({list(weights)}) needs one weight > 0 for each of data.train's "
                f"{len(self.train)} entries"
            )
        return self
