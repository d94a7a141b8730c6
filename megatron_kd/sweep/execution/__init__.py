"""Run the tasks of a sweep, here or on Slurm, and keep their records."""
