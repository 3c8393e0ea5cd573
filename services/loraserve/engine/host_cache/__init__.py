"""The host cache: keeps slabs evicted from the pool in host memory, so that they can be reloaded quickly."""
