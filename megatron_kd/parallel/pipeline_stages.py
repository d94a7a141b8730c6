"""Compute which layers a pipeline stage holds."""

from __future__ import annotations


def stage_of_layer(layer: int, num_layers: int, *, pipeline: int, virtual: int = 1) -> int:
    """Return the pipeline stage that holds a layer, if every model chunk has as many layers.

    Args:
        layer: Number of the layer, from 1.
        num_layers: Layers of the model.
        pipeline: Pipeline-parallel size.
        virtual: Model chunks per stage. They are interleaved if there are several.
    """
    return (layer - 1) * pipeline * virtual // num_layers % pipeline
