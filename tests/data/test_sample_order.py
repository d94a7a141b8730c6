"""Test that every run cuts the same samples and leaves the data folder unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data.token_data import all_tokens, build, random_documents, write_tokens


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", random_documents(60))


def test_every_run_reads_the_same_samples_in_another_order(prefix: str, tmp_path: Path) -> None:
    """A stored target of a sample must serve every seed, pass and blend."""
    dataset = build(prefix, tmp_path / "cache", num_samples=1000)
    (samples,) = dataset.prefixes
    one_pass = {tuple(samples.samples[i]["tokens"].tolist()) for i in range(len(samples))}
    for ordered in (dataset, build(prefix, tmp_path / "cache", num_samples=1000, seed=6)):
        passes = [
            all_tokens(ordered)[start : start + len(samples)]
            for start in range(0, 3 * len(samples), len(samples))
        ]
        for tokens in passes:
            assert {tuple(sample.tolist()) for sample in tokens} == one_pass
            assert len(tokens) == len(samples)
        assert not torch.equal(passes[0], passes[1]), "each pass has a separate order"


def test_the_data_folder_is_only_read(tmp_path: Path) -> None:
    """The data may be mounted read-only.

    Tests in containers run as root, which may write anywhere, so the state of the folder is
    compared.
    """
    paths = [
        write_tokens(tmp_path / "data" / name, random_documents(60, seed))
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
