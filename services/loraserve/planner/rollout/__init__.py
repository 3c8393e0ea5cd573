"""The roll-out of a plan: a state machine, its events, and what is left of a plan when copies fail. Pure."""
