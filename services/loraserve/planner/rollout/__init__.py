"""The roll-out of plans: a pure state machine with its events, and the copies that remain when some fail."""
