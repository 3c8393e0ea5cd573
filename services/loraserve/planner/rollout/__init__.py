"""The roll-out of plans: a state machine without I/O, its events, and the replacement of copies that fail."""
