"""Declare the sections of a run file: one frozen pydantic model each, which checks itself.

Relations between sections are checked in `config/relations.py`. No module here imports torch, so
that a login node can check a run file in milliseconds. The description of a field states its unit
and range: `--help` and the reference page of the documentation print it.
"""

from megatron_kd.config.sections.batch_section import BatchSection
from megatron_kd.config.sections.capture_section import CaptureSection
from megatron_kd.config.sections.checkpoint_section import CheckpointSection
from megatron_kd.config.sections.data_section import DataSection
from megatron_kd.config.sections.distill_section import DistillSection
from megatron_kd.config.sections.model_section import ModelSection
from megatron_kd.config.sections.optimizer_section import OptimizerSection
from megatron_kd.config.sections.parallel_section import ParallelSection
from megatron_kd.config.sections.run_section import RunSection
from megatron_kd.config.sections.section import Section
from megatron_kd.config.sections.teacher_section import TeacherParallelSection, TeacherSection
from megatron_kd.config.sections.telemetry_section import TelemetrySection
from megatron_kd.config.sections.train_section import TrainSection

__all__ = [
    "BatchSection",
    "CaptureSection",
    "CheckpointSection",
    "DataSection",
    "DistillSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "RunSection",
    "Section",
    "TeacherParallelSection",
    "TeacherSection",
    "TelemetrySection",
    "TrainSection",
]
