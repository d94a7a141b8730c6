"""Make the tasks and cells of a sweep from the sections of its file."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, load_config
from megatron_kd.sweep.definition.paper_figures import paper_figures
from megatron_kd.sweep.definition.sweep_file import (
    CellSection,
    JobSection,
    SweepSection,
    TaskSection,
)
from megatron_kd.sweep.definition.tasks import (
    Cell,
    Task,
    TaskStep,
    config_digest,
    digest,
)
from megatron_kd.sweep.definition.templating import as_text, check_name, fill, slug


@dataclass(frozen=True)
class TaskMaker:
    """Make the tasks of one sweep.

    Attributes:
        path: The sweep file.
        out: Folder of the sweep.
        section: [sweep] of the file.
        variables: Values by name, expanded.
        ranks: Processes of a run whose section does not say.
    """

    path: Path
    out: Path
    section: SweepSection
    variables: dict[str, Any]
    ranks: int

    def job(self, section: JobSection, values: Mapping[str, Any]) -> Task:
        """Make the task of a job for one combination of values; its needs may be globs.

        Raises:
            ConfigError: Something of the section cannot work.
        """
        names, name = self._names(section, values, "job")
        location = f"{self.path}: job {name!r}"
        folder = f"jobs/{slug(name)}" if slug(name) else ""
        names |= {"run": str(self.out / folder)}
        needs = fill(section.needs, names, f"{location}: needs")
        step = self._main_step(section, names, location, seed=None)
        return Task(name, folder, (step,), tuple(needs), self._ranks(section))

    def cell(
        self,
        section: CellSection,
        values: Mapping[str, Any],
        seeds: Sequence[int],
        jobs: Sequence[str],
    ) -> Cell:
        """Make a cell for one combination of values, with a task for every seed.

        Args:
            section: The [[cell]].
            values: Values that vary, by name.
            seeds: Seeds of the cell.
            jobs: Names of all jobs, which the cell may need.

        Returns:
            The cell.

        Raises:
            ConfigError: Something of the section cannot work.
        """
        names, name = self._names(section, values, "cell")
        location = f"{self.path}: cell {name!r}"
        runs: dict[int, Task] = {}
        for seed in seeds:
            folder = f"runs/{slug(name)}/seed-{seed}"
            seed_names = {**names, "seed": seed, "run": str(self.out / folder)}
            steps = [
                self._main_step(section, seed_names, location, seed=seed),
                *(
                    self._command(f"measure-{number}", words, seed_names, location)
                    for number, words in enumerate(self._measures(section), 1)
                ),
            ]
            patterns = fill(section.needs, seed_names, f"{location}: needs")
            needs = match_needs(self.path, patterns, jobs, name)
            task = Task(f"{name}, seed {seed}", folder, tuple(steps), needs, self._ranks(section))
            runs[seed] = task
        group = as_text(fill(section.group, names, f"{location}: group"))
        cell_values = {key: names[key] for key in values}
        figures = paper_figures(section, name, list(cell_values.values()), location)
        return Cell(name, group, slug(name), cell_values, figures, runs)

    def _ranks(self, section: TaskSection) -> int:
        return 1 if section.run is None else section.ranks or self.ranks

    def _measures(self, section: CellSection) -> list[list[Any]]:
        if section.measure is None and section.run is not None:
            return self.section.measure
        return section.measure or []

    def _names(
        self, section: TaskSection, values: Mapping[str, Any], kind: str
    ) -> tuple[dict[str, Any], str]:
        """Return all values by name for one combination, and the expanded name of the section."""
        location = f"{self.path}: {kind} {section.name!r}"
        for name in values:
            check_name(name, f"{location}: vary")
        expanded = {
            name: fill(value, self.variables, f"{location}: vary") for name, value in values.items()
        }
        names = {**self.variables, **expanded}
        return names, as_text(fill(section.name, names, f"{location}: name"))

    def _main_step(
        self, section: TaskSection, names: Mapping[str, Any], location: str, *, seed: int | None
    ) -> TaskStep:
        if section.run is not None:
            return self._run(section, names, location, seed=seed)
        return self._command("command", section.command or [], names, location)

    def _command(
        self, name: str, words: Sequence[Any], names: Mapping[str, Any], location: str
    ) -> TaskStep:
        argv = [as_text(word) for word in fill(list(words), names, f"{location}: {name}")]
        if any("\0" in word for word in argv):
            raise ConfigError(f"{location}: {name}: a word has a zero byte")
        # The digest leaves the path of the interpreter out: another one does not change the task.
        same_everywhere = fill(list(words), {**names, "python": "{python}"}, location)
        return TaskStep(name, tuple(argv), digest([as_text(word) for word in same_everywhere]))

    def _run(
        self, section: TaskSection, names: Mapping[str, Any], location: str, *, seed: int | None
    ) -> TaskStep:
        run_file = as_text(fill(section.run, names, f"{location}: run"))
        overrides = fill(
            {**self.section.overrides, **section.overrides}, names, f"{location}: overrides"
        )
        automatic = {"run.directory": names["run"]} | ({} if seed is None else {"train.seed": seed})
        for key in automatic:
            if key in overrides:
                raise ConfigError(
                    f"{location}: overrides: {key} is set by the sweep itself: leave it out"
                )
        arguments = [
            "--config",
            str(self.path.resolve().parent / run_file),
            *(f"--{key}={as_text(value)}" for key, value in {**overrides, **automatic}.items()),
        ]
        try:
            config = load_config(arguments)
        except ConfigError as error:
            lines = (f"{location}: {line}" for line in str(error).splitlines())
            raise ConfigError("\n".join(lines)) from None
        ranks = self._ranks(section)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        program = [*(launcher if ranks > 1 else []), "-m", "megatron_kd.pretrain", *arguments]
        return TaskStep("run", (sys.executable, *program), config_digest(config), config)


def match_needs(
    path: Path, needs: Sequence[str], jobs: Sequence[str], name: str
) -> tuple[str, ...]:
    """Return the names of the jobs that match `needs`, each a name or a glob.

    Args:
        path: The sweep file, for the error message.
        needs: Names or globs.
        jobs: Names of all jobs.
        name: Name of the job or cell that has the needs, for the error message.

    Returns:
        Names of jobs, each once.

    Raises:
        ConfigError: One of `needs` matches no job.
    """
    matches: dict[str, None] = {}
    for need in needs:
        names = [need] if need in jobs else fnmatch.filter(jobs, need)
        if not names:
            raise ConfigError(
                f"{path}: {name!r} needs {need!r}, and no job has that name: "
                f"jobs are {', '.join(map(repr, jobs)) or 'none'}"
            )
        matches |= dict.fromkeys(names)
    return tuple(matches)
