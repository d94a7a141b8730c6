"""Read token data in a run: tokenizers, token files, the sample order and microbatches.

Importing this package imports neither torch nor megatron. Its modules import what they need.
`preparation` makes token files, and a run never imports it.
"""
