"""Report plans: the layouts as text and pictures, budgets, and descriptions of models."""
