"""The adapters in an engine's pool: their states, which stay, which load next, and which are prefetched."""
