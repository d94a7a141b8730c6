"""Multiply hidden states by the output weight chunk by chunk, with the loss inside the product."""
