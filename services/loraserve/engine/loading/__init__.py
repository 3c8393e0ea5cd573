"""Loading of slabs into the pool: the loader, the sources of slabs, and verification."""
