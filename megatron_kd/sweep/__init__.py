"""Experiments: a grid of runs in one TOML file, started once each, and what came of them as a table and a page."""
