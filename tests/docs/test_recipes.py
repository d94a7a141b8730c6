"""Follow every recipe of CONTRIBUTING.md on a toy example, in a copy of the tree.

Each recipe touches only the files that its table names. The copy holds all toy additions at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("megatron_kd", "tools", "examples", "tests", "docs")

# Recipe -> [(file, text to insert before; None: a new file, the toy addition)].
TOYS: dict[str, list[tuple[str, str | None, str]]] = {
    "A divergence": [
        (
            "megatron_kd/config/declarations/divergences.py",
            '    "forward_kl": DivergenceDeclaration(\n',
            """    "scaled_kl": DivergenceDeclaration(
        "factor q (log q - log p)",
        "a multiple of KL(teacher || student)",
        "a toy",
        parameters=(Parameter("toy_factor", 3.0, "scaled_kl: its factor, > 0.", gt=0),),
    ),
""",
        ),
        (
            "megatron_kd/losses/divergences/scaled_kl.py",
            None,
            '''"""Define scaled_kl, a toy."""

from torch import Tensor


def term(log_q: Tensor, log_p: Tensor, *, toy_factor: float) -> Tensor:
    """Return factor q (log q - log p)."""
    return toy_factor * log_q.exp() * (log_q - log_p)
''',
        ),
    ],
    "A metric": [
        (
            "megatron_kd/losses/token_metrics.py",
            '    TokenMetric(\n        "teacher_mass",\n',
            """    TokenMetric(
        "student_perplexity",
        "at least 1",
        "exponential of the cross-entropy",
        lambda statistics: statistics.ce.exp(),
        needs_teacher=False,
    ),
""",
        ),
    ],
    "A token rule": [
        (
            "megatron_kd/config/declarations/adaptive_methods.py",
            '    "normkd": AdaptiveMethod(\n',
            '    "doubled": AdaptiveMethod("2 x distill.temperature"),\n',
        ),
        (
            "megatron_kd/losses/token_rules.py",
            "# Method of `distill.adaptive` -> its rule.\n",
            '''class DoubledTemperature(TokenRule):
    """Double the temperature of every token."""

    def apply(self, terms: TokenTerms, context: TokenContext) -> TokenTerms:
        """Return terms with 2 x temperature."""
        return replace(terms, temperature=2.0 * terms.temperature)


''',
        ),
        (
            "megatron_kd/losses/token_rules.py",
            '    "normkd": lambda settings',
            '    "doubled": lambda settings: DoubledTemperature(),\n',
        ),
    ],
    "A schedule": [
        (
            "megatron_kd/config/declarations/schedules.py",
            "LEARNING_RATE_SCHEDULES: dict",
            """def _halved(step: int, steps: int, section: OptimizerSettings) -> float:
    return 0.5 * section.learning_rate


""",
        ),
        (
            "megatron_kd/config/declarations/schedules.py",
            '    "cosine": LearningRateSchedule(',
            '    "halved": LearningRateSchedule("half the peak", _halved),\n',
        ),
    ],
    "A teacher source": [
        (
            "megatron_kd/config/sections/teacher_section.py",
            '    "online": SourceTraits(',
            '    "uniform": SourceTraits("all ids are equally probable"),\n',
        ),
        (
            "megatron_kd/teacher/uniform.py",
            None,
            '''"""Teach that all ids are equally probable."""

from __future__ import annotations

from megatron_kd.teacher.source import TeacherInputs, TeacherSource
from megatron_kd.teacher.teacher import Teacher


class UniformTeacher(Teacher):
    """Give the same target for every token."""

    def __init__(self, vocab_size: int, top_k: int) -> None:
        self.vocab_size, self.top_k = vocab_size, top_k

    def targets(self, microbatches, *, step=None):
        """Return a uniform target for each microbatch."""
        import torch

        from megatron_kd.targets import TopSelection, select_targets

        return [
            select_targets(
                torch.zeros(*microbatch.tokens.t().shape, self.vocab_size), TopSelection(self.top_k)
            )
            for microbatch in microbatches
        ]


class Source(TeacherSource):
    """Source of a uniform teacher."""

    def build(self, inputs: TeacherInputs, groups) -> Teacher:
        """Return the teacher. No collective."""
        return UniformTeacher(inputs.vocab_size, self.config.distill.top_k)
''',
        ),
    ],
    "A kind of tokenizer, an input format": [
        (
            "megatron_kd/data/preparation/formats/paragraphs.py",
            None,
            '''"""Read text files, one document per paragraph."""

from typing import ClassVar

from megatron_kd.data.preparation.formats.document_format import Document, DocumentFormat, open_file


class Paragraphs(DocumentFormat):
    """Take each paragraph of a file as a document."""

    name: ClassVar[str] = "paragraphs"
    suffixes: ClassVar[tuple[str, ...]] = (".para",)

    def documents(self, unit, text_key, counter):
        """Yield the paragraphs in order."""
        with open_file(unit.file.path) as stream:
            texts = stream.read().decode("utf-8").split("\\n\\n")
        for number, text in enumerate(texts):
            counter.lines += 1
            yield Document(f"{unit.file.key}:{number}", number + 1, text)
''',
        ),
    ],
    "A plot": [
        (
            "megatron_kd/sweep/plots/kinds/dots.py",
            None,
            '''"""Plot the mean of a metric of every cell as a dot."""

from megatron_kd.sweep.plots.picture import Picture, PlotKind, PlotPoint, PlotSeries


def _make(result, plot, cells):
    series = [
        PlotSeries(cell.name, (PlotPoint(cell.samples[plot["metric"]].mean or 0.0, 0.0),))
        for cell in cells
    ]
    return Picture("dots", plot["title"], plot["metric"], "cell", tuple(series))


def _draw(canvas, picture):
    for position, series in enumerate(picture.series):
        canvas.mark(series.points[0].x, position, series.name, "o")


KIND = PlotKind(
    name="dots",
    required_keys=("metric",),
    make=_make,
    draw=_draw,
    caption="Means.",
    metric_keys=("metric",),
)
''',
        ),
    ],
    "A fault": [
        (
            "tests/helpers/faults.py",
            '    "1": Fault(\n',
            '    "toy": Fault("nothing happens", "nothing comes of it"),\n',
        ),
    ],
}

CHECKS = {
    "A divergence": """
import torch
from megatron_kd.config import load_config
from megatron_kd.losses import DenseTeacher, Divergence, linear_divergence
torch.manual_seed(0)
hidden, weight, teacher = torch.randn(6, 4), torch.randn(9, 4), torch.randn(6, 4)
labels = torch.randint(0, 9, (6,))
def kd(divergence):
    return linear_divergence(
        hidden, weight, labels, DenseTeacher(teacher, weight), divergence=divergence, alpha=1.0
    ).kd
kl = kd("forward_kl")
assert torch.allclose(kd("scaled_kl"), 3 * kl, rtol=1e-5)
assert torch.allclose(kd(Divergence("scaled_kl", toy_factor=5.0)), 5 * kl, rtol=1e-5)
overrides = ["--distill.divergence", "scaled_kl", "--distill.toy_factor", "2"]
config = load_config(["--config", RUN_FILE, *overrides])
assert config.distill.divergence == "scaled_kl"
""",
    "A metric": """
from megatron_kd.losses.token_metrics import TOKEN_METRICS
from megatron_kd.telemetry.metrics import metrics_reference
assert "student_perplexity" in metrics_reference()
import json
lines = train("--train.steps", "2")
assert all(1 < line["student_perplexity"] < 1e4 for line in lines)
""",
    "A token rule": """
lines = train("--train.steps", "2", "--distill.adaptive.method", "doubled", teacher="uniform")
assert lines[-1]["kd_loss"] >= 0
""",
    "A schedule": """
words = ["--train.steps", "3", "--optimizer.schedule", "halved", "--optimizer.warmup_steps", "0"]
lines = train(*words)
assert [line["learning_rate"] for line in lines] == [0.0005] * 3
""",
    "A teacher source": """
lines = train("--train.steps", "2", teacher="uniform")
assert lines[0]["kd_loss"] > 0
""",
    "A kind of tokenizer, an input format": """
from pathlib import Path
from megatron_kd.data.preparation.documents import FORMATS
assert "paragraphs" in FORMATS
""",
    "A plot": """
from megatron_kd.sweep.plots.kinds import PLOT_KINDS
assert PLOT_KINDS["dots"].caption == "Means."
""",
    "A fault": """
from tests.helpers.faults import FAULTS
assert FAULTS["toy"].criterion
""",
}

PRELUDE = """
import json, sys
from pathlib import Path
RUN_FILE = sys.argv[1]

def train(*words, teacher="none"):
    from tests.helpers.tiny import write_tokens
    from megatron_kd.pretrain import main
    folder = Path.cwd()
    tokens = write_tokens(folder, tokens=3000)
    content = Path(RUN_FILE).read_text().replace("TOKENS", tokens)
    Path("run.toml").write_text(content)
    options = ["--teacher.source", teacher, "--distill.alpha", "0.5", "--distill.top_k", "101"]
    code = main(["--config", "run.toml", *words, *(options if teacher != "none" else [])])
    assert code == 0, code
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
"""

RUN_FILE = """
[model]
hidden_size = 16
num_layers = 2
num_attention_heads = 2
ffn_hidden_size = 32
vocab_size = 101
[data]
train = ["TOKENS"]
[batch]
global_batch_size = 2
micro_batch_size = 1
sequence_length = 16
[optimizer]
learning_rate = 1e-3
[train]
steps = 2
device = "cpu"
precision = "fp32"
[telemetry]
tensorboard = false
progress = "off"
peak_tflops = 1.0
log_interval = 1
[run]
directory = "run"
"""


def recipes() -> dict[str, str]:
    """Return the recipes of CONTRIBUTING.md: title -> text."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (.+)$", text[text.index("## Recipes") :], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tree with every toy addition."""
    copy = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for additions in TOYS.values():
        for name, anchor, text in additions:
            path = copy / name
            if anchor is None:
                assert not path.exists(), name
                path.write_text(text, encoding="utf-8")
                continue
            content = path.read_text(encoding="utf-8")
            assert content.count(anchor) == 1, f"{name}: {anchor!r}"
            path.write_text(content.replace(anchor, text + anchor), encoding="utf-8")
    return copy


@pytest.mark.parametrize("title", TOYS)
def test_recipe_names_its_files(title: str) -> None:
    text = recipes()[title]
    for name, _, _ in TOYS[title]:
        pattern = f"{Path(name).parent}/<"
        assert name in text or pattern in text, f"{title}: {name}"


@pytest.mark.parametrize("title", CHECKS)
def test_recipe_works(title: str, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(RUN_FILE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + CHECKS[title], str(tmp_path / "toy.toml")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_of_every_recipe_exist() -> None:
    for title, text in recipes().items():
        for name in re.findall(r"`((?:megatron_kd|tests|examples)/[\w/.]+)`", text):
            assert (ROOT / name).exists(), f"{title}: {name}"


def test_recipes_are_the_promised_ones() -> None:
    titles = " ".join(recipes())
    for word in (
        *("divergence", "loss term", "metric", "token rule", "schedule", "teacher source"),
        *("model family", "tokenizer", "kernel", "plot", "fault", "experiment"),
    ):
        assert word in titles, word
