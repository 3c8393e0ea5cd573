"""The planner decides which engines hold copies of which adapters, and rolls out plans."""
