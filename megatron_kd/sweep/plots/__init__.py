"""Compute and draw the plots of runs and sweeps."""
