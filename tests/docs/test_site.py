"""Build the documentation in strict mode, and look for what readers follow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built pages; every warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        ["bash", str(ROOT / "docs/build.sh"), "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHON": sys.executable, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_pages_hold_what_is_generated(site: Path) -> None:
    from megatron_kd.config.declarations.divergences import DIVERGENCES
    from megatron_kd.telemetry.metrics import METRICS

    run_file = (site / "run_file/index.html").read_text(encoding="utf-8")
    losses = (site / "losses/index.html").read_text(encoding="utf-8")
    metrics = (site / "metrics/index.html").read_text(encoding="utf-8")
    for key in ("distill.alpha", "global_batch_size", "micro_batch_size"):
        assert key.split(".")[-1] in run_file
    for name in DIVERGENCES:
        assert name in losses
    for name in METRICS:
        assert name in metrics
    assert not list(site.rglob("hooks.py"))


def test_api_page_shows_arguments(site: Path) -> None:
    page = (site / "api/index.html").read_text(encoding="utf-8")
    for name in ("linear_kd_cross_entropy", "SparseTarget", "CacheReader", "load_tokenizer"):
        assert name in page
    assert page.count("Parameters:") > 5


def test_no_placeholder_is_left(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r"<!-- [a-z ]+ -->", page.read_text(encoding="utf-8")), page
