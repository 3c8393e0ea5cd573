"""The store process: the durable adapter registry and the slab files; validates and packs adapters."""
