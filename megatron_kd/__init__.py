"""Pretrain language models with knowledge distillation on megatron-core.

Importing this package touches no device, process group or environment variable.
"""

__version__ = "0.1.0"
