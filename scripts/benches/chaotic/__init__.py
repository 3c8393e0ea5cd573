"""Engines that are killed, stopped and poisoned while they serve."""
