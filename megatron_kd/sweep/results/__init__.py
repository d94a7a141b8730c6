"""Read the results of runs and sweeps, and format them as tables."""
