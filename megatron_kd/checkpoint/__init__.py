"""Save, verify, find, load and convert checkpoints."""
