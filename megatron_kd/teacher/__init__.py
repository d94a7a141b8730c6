"""Produce distillation targets: one module per teacher source, its live objects in runtime/."""
