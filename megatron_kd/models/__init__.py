"""Build the student and the teacher from megatron-core's layer specs."""
