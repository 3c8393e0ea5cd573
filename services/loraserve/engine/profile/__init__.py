"""Measures what the steps and loads of a real engine cost: ``python -m loraserve.engine.profile``, scripts/profile."""
