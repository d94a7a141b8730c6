"""Hold one module per format of input files.

A new format is one module with one subclass of `base.DocumentFormat`. `documents` finds it here.
"""
