"""Saving, finding, loading and resuming the state of one run."""
