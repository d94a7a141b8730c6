"""Hold a toy example of every recipe of CONTRIBUTING.md."""

from __future__ import annotations

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
    "A loss term": [
        (
            "megatron_kd/losses/spec.py",
            "    divergence: Divergence = field(",
            "    linear_z: float = 0.0\n",
        ),
        (
            "megatron_kd/losses/mix.py",
            "self.spec.z_loss * logsumexp**2",
            "self.spec.linear_z * logsumexp + ",
        ),
        (
            "megatron_kd/losses/mix.py",
            "2.0 * self.spec.z_loss * logsumexp),",
            "self.spec.linear_z + ",
        ),
        (
            "megatron_kd/losses/reference.py",
            "    return KDLoss(total, ce.detach(), kd.detach())\n",
            "    total = total + spec.linear_z * torch.where(counted, logsumexp, 0.0)\n",
        ),
        (
            "megatron_kd/config/sections/distill_section.py",
            "    z_loss: float = Field(",
            '    linear_z: float = 0.0\n    """A toy: weight of the logsumexp."""\n',
        ),
        (
            "megatron_kd/train/build.py",
            "        teacher_only=distill",
            "        linear_z=distill.linear_z,\n",
        ),
    ],
    "A model family": [
        (
            "megatron_kd/models/huggingface/families.py",
            '    "mistral": Family(\n',
            '    "toy": Family("ToyForCausalLM", {"rms_norm_eps": 1e-5}),\n',
        ),
    ],
    "A kernel": [
        (
            "megatron_kd/head/plain_rows.py",
            "    def mass(self, temperature",
            """    def largest(self) -> Tensor:
        return self.buffer[:, : self.valid].amax(1)

""",
        ),
        (
            "megatron_kd/head/triton_rows.py",
            "    def mass(self, temperature",
            """    def largest(self) -> Tensor:
        return self._tile_sums(1.0, entropy=False, total=False).largest.amax(1)

""",
        ),
    ],
    "An experiment": [
        (
            "examples/toy/sweep.toml",
            None,
            """[sweep]
title = "A toy"
text = "Nothing is asked."
seeds = [1]

[[cell]]
group = "rate"
name = "rate {rate}"
vary = { rate = [0.1, 0.2] }
run = "run.toml"
overrides = { "optimizer.learning_rate" = "{rate}" }

[[metric]]
name = "loss"
file = "metrics.jsonl"
key = "ce_loss"
unit = "nats per token"
better = "lower"
""",
        ),
        ("examples/toy/run.toml", None, "RUN_FILE"),
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
