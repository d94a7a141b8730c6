"""Hold one module per format of input files.

A new format is one module with one subclass of `document_format.DocumentFormat`, which `documents`
finds here.
"""
