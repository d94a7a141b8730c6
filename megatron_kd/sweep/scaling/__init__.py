"""Fit scaling laws of plain and distilled pretraining to finished runs, and predict with them."""
