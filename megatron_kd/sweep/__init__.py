"""Run grids of experiments, locally or on Slurm, and show their tables, plots and pages."""
