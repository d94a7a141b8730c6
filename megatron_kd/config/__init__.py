"""One run's configuration: frozen sections, a run file with overrides, and nothing that needs torch."""

from megatron_kd.config.capture_section import CaptureSection
from megatron_kd.config.dump import dump_toml
from megatron_kd.config.load import load_config
from megatron_kd.config.run_config import ConfigError, RunConfig
from megatron_kd.config.sections import (
    BatchSection,
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
