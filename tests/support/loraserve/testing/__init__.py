"""Small real helpers for tests: a clock to turn by hand, an event loop in virtual time, a network in memory."""
