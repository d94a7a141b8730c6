"""Convert weights between checkpoints of this package, of other programs and Hugging Face."""
