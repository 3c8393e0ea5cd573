"""Decides what each step computes: the scheduler and the state that only it uses.

Pure: no clock, no I/O, no tensors.
"""
