"""Injects faults into real processes: a slow, stuck or full disk, a step of the wall clock, and a faulty bus."""
