"""The monitor: publishes engine load, live engines and demand per adapter. Other processes act on this data."""
