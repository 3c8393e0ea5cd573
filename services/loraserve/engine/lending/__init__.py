"""Leases with which peers read slabs from this engine's memory, and the transports that they read over."""
