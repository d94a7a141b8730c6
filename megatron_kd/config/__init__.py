"""Read and check run files: sections, presets, overrides and `--help`. Needs no torch."""

from megatron_kd.config.dump import dump_toml
from megatron_kd.config.errors import ConfigError
from megatron_kd.config.load import load_config
from megatron_kd.config.run_config import RunConfig
from megatron_kd.config.sections import (
    BatchSection,
    CaptureSection,
    CheckpointSection,
    DataSection,
    DistillSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    Section,
    TeacherSection,
    TelemetrySection,
    TrainSection,
)

__all__ = [
    "BatchSection",
    "CaptureSection",
    "CheckpointSection",
    "ConfigError",
    "DataSection",
    "DistillSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "RunConfig",
    "RunSection",
    "Section",
    "TeacherSection",
    "TelemetrySection",
    "TrainSection",
    "dump_toml",
    "load_config",
]
