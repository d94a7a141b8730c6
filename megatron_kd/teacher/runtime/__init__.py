"""Run teachers: the objects that sources build once torch and megatron-core are loaded."""
