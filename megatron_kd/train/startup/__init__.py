"""Checks and decisions before the first step: inputs, run fingerprint, resume."""
