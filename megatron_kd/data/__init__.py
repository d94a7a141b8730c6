"""Token data: tokenizer identity, Megatron .bin/.idx files, the deterministic sample order, and microbatches.

Importing this package imports neither torch nor megatron; its modules import what they need.
"""
