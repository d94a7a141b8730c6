"""Wiring, one step, the loop around it, and evaluation. No loss arithmetic here."""
