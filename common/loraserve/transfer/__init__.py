"""Reads of another process's memory: a common protocol and one module for each transport."""
