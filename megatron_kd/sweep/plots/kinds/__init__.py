"""Register the kinds of plots: every module of this package defines one as KIND."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_kd.sweep.plots.picture import PlotKind


def _kinds() -> dict[str, PlotKind]:
    kinds: dict[str, PlotKind] = {}
    for module in pkgutil.iter_modules(__path__):
        kind: PlotKind = importlib.import_module(f"{__name__}.{module.name}").KIND
        kinds[kind.name] = kind
    return kinds


PLOT_KINDS = _kinds()
