"""Student and teacher from megatron-core specs."""
