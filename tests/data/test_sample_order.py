"""Where samples are cut and in which order they come; the rest of the data room: test_data.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data.test_data import all_tokens, build, some_documents, write_tokens


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", some_documents(60))


def test_every_run_reads_the_same_samples_in_another_order(prefix: str, tmp_path: Path) -> None:
    """So that what is stored for a sample serves every seed, pass and blend."""
    one = build(prefix, tmp_path / "cache", num_samples=1000)
    (part,) = one.parts
    whole = {tuple(part.samples[i]["tokens"].tolist()) for i in range(len(part))}
    for dataset in (one, build(prefix, tmp_path / "cache", num_samples=1000, seed=6)):
        passes = [
            all_tokens(dataset)[start : start + len(part)]
            for start in range(0, 3 * len(part), len(part))
        ]
        for rows in passes:
            assert {tuple(row.tolist()) for row in rows} == whole
            assert len(rows) == len(part)
        assert not torch.equal(passes[0], passes[1]), "each pass has an order of its own"


def test_the_data_folder_is_only_read(tmp_path: Path) -> None:
    """So that it may be mounted read-only; root, who runs tests in containers, may write anywhere, so the folder itself is looked at."""
    paths = [
        write_tokens(tmp_path / "data" / name, some_documents(60, seed))
        for seed, name in enumerate(("one", "two"))
    ]

    def state() -> list[tuple[str, int, int]]:
        return sorted(
            (path.name, path.stat().st_mtime_ns, path.stat().st_size)
            for path in [tmp_path / "data", *(tmp_path / "data").iterdir()]
        )

    (tmp_path / "data").chmod(0o555)
    before = state()
    for within in (False, True):
        for kind in (paths, paths[0]):
            all_tokens(build(kind, tmp_path / "cache", within_documents=within))
    assert state() == before
    assert any((tmp_path / "cache").iterdir())
    (tmp_path / "data").chmod(0o755)
