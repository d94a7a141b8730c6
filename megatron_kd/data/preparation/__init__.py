"""Make token files from text and conversations. A training run never imports this package."""
