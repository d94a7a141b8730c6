"""Metrics, throughput and progress of a run, and the files they are written to."""
