"""The adapters in an engine's pool: their states, eviction, load order and prefetching."""
