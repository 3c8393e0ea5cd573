"""Reading a slab into the pool: the loader, its sources, and the verification of what arrives."""
