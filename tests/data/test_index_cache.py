"""Test the index cache: a damaged one is refused, concurrent runs share one."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_kd.config import ConfigError
from megatron_kd.data import index_cache
from tests.data.token_data import all_tokens, build, random_documents, write_tokens


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", random_documents(60))


@pytest.mark.fault(12, 16, "S9", "S10")
def test_unusable_index_caches_are_refused(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match="cannot write .*set data.index_cache to a writable folder"
    ):
        build(prefix, tmp_path / "file")
    build(prefix, tmp_path / "cache")
    (array,) = (tmp_path / "cache").glob("samples-*/*shuffle_index.npy")
    complete = array.read_bytes()
    for content in (
        complete[:-8],
        complete[:5],
        b"",
        pickle.dumps(Sentinel(str(tmp_path / "sentinel"))),
    ):
        array.write_bytes(content)
        with pytest.raises(ConfigError, match="is damaged .*delete this folder"):
            build(prefix, tmp_path / "cache")
    assert not (tmp_path / "sentinel").exists(), "a pickle in the cache was run"
    array.unlink()
    with pytest.raises(ConfigError, match="has 2 arrays in place of 3"):
        build(prefix, tmp_path / "cache")
    monkeypatch.setattr(index_cache, "global_rank", lambda: 3)
    with pytest.raises(ConfigError, match="rank 3 does not see .*shared by all nodes"):
        build(prefix, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists(), "only rank 0 may write"


class Sentinel:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def test_concurrent_runs_share_the_cache(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two races are simulated.

    Another run renames its folder just before this one does. A killed run with the same process id
    has left its temporary folder.
    """
    other = write_tokens(tmp_path / "other", [[1] * 400])
    expected = all_tokens(build([prefix, other], tmp_path / "expected"))
    rename, faster = os.rename, []

    def rename_too_late(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        faster.append(target.name)
        rename(source, target)

    monkeypatch.setattr(index_cache.os, "rename", rename_too_late)
    assert torch.equal(all_tokens(build([prefix, other], tmp_path / "cache")), expected)
    assert len(faster) == 3
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(faster)
    monkeypatch.setattr(index_cache.os, "rename", rename)
    for name in faster:
        rename(tmp_path / "cache" / name, tmp_path / "cache" / f".{name}.partial-{os.getpid()}")
    assert torch.equal(all_tokens(build([prefix, other], tmp_path / "cache")), expected)
