"""Code that several benches use."""
