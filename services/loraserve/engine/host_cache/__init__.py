"""Host memory that keeps slabs which left the pool, so that they need not be read from elsewhere again."""
