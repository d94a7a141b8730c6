"""Declare what a run file can name: divergences, adaptive methods, schedules."""
