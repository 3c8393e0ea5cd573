"""The store process: validates and packs adapters, and keeps the adapter registry and slab files on disk."""
