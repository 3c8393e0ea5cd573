"""Helpers for tests and benchmarks: clocks, scripted peers, local clusters, tiny models. Not packaged in the wheel."""
