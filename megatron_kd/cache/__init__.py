"""Store a teacher's targets on disk and find each by the tokens it belongs to.

The format is described in FORMAT.md.
"""

from megatron_kd.cache.identity import (
    CacheError,
    CacheIdentity,
    CacheInUse,
    CorruptCache,
    MissingTarget,
    WrongCache,
)
from megatron_kd.cache.reader import CacheReader
from megatron_kd.cache.writer import CacheWriter

__all__ = [
    "CacheError",
    "CacheIdentity",
    "CacheInUse",
    "CacheReader",
    "CacheWriter",
    "CorruptCache",
    "MissingTarget",
    "WrongCache",
]
