"""Check inputs, fingerprint the run and choose the checkpoint to resume, before the first step."""
