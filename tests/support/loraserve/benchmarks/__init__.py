"""Benchmarks, accuracy checks and the block-size search of the kernels, and the writer of the derived profiles.

The wheel does not contain this package.
"""
