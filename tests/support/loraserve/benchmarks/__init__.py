"""Benchmarks, accuracy checks and the block-size search of the kernels. None of it ships in the wheel."""
