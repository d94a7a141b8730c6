"""A real Slurm in a minute: scripts are accepted, and an interrupted run is requeued.

The longer tests are in test_slurm_cluster.py.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator

import pytest

from tests.helpers.slurm import ROOT, Cluster, missing
from tests.helpers.slurm_site import HOSTILE, NO_TEACHER, TWO, Site

pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    with Cluster(folder / "c") as cluster:
        yield Site(cluster, folder / HOSTILE)


def test_every_script_would_be_accepted(site: Site) -> None:
    scripts = sorted((ROOT / "examples/slurm").glob("*.sbatch"))
    assert len(scripts) >= 8
    for script in scripts:
        words = ["sbatch", "--test-only", "--partition=big", f"examples/slurm/{script.name}"]
        process = subprocess.run(
            words,
            cwd=site.folder,
            env=site.cluster.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == 0, (script, process.stderr)
        assert "to start at" in process.stderr, (script, process.stderr)


def test_commands_of_the_page(site: Site) -> None:
    page = (ROOT / "examples/slurm/README.md").read_text()
    commands = [
        shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("sbatch ")
    ]
    assert len(commands) == 2
    for words in commands:
        words = [
            "sbatch",
            "--test-only",
            "--partition=big",
            *(word.replace("node17", "big17") for word in words[1:]),
        ]
        process = subprocess.run(
            words,
            cwd=site.folder,
            env=site.cluster.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == 0, (words, process.stderr)
        assert "to start at" in process.stderr, (words, process.stderr)


@pytest.mark.fault(4, 14)
def test_a_signal_requeues_the_run(site: Site) -> None:
    """On SIGUSR1 it is saved, requeued, finished and exported; names are not run."""
    words = site.overrides(
        **NO_TEACHER, train__steps=60, run__directory="runs/$(touch sentinel-3) 'x'"
    )
    name = '$(touch sentinel-4)";touch sentinel-5 `touch sentinel-6`'
    job = site.submit("student_1b.sbatch", [*TWO, f"--job-name={name}"], words)
    site.reaches("runs/$(touch sentinel-3) 'x'", 3, job)
    site.cluster.ask("scancel", "--signal=USR1", job)
    log = site.ends(job)
    assert "2 ranks on 2 nodes are fit" in log
    assert "saved and stopped: SIGUSR1 requested it" in log
    assert "finished at 60" in log
    assert site.cluster.show(job, "Restarts") == "1"
    assert site.weights("exported/student-1b")
    assert [
        row["step"] for row in site.curve("runs/$(touch sentinel-3) 'x'") if "split" not in row
    ] == list(range(1, 61))
    site.untouched()
