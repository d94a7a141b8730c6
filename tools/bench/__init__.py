"""Measure this project's parts; the programs tools/bench_*.py print the results."""
