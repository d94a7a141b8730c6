"""Hold one module per kind of tokenizer file.

A new kind is one module with one subclass of `vocabulary.Vocabulary`, which `data.tokenizer` finds
here.
"""
