"""Other servers and libraries that benches compare with."""
