"""Engines and parts of engines for tests: fakes, clients, peers, and the engine without its process."""
