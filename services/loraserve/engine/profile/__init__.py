"""Measures the time of steps and adapter loads on a real engine. Entry point: scripts/profile."""
