"""Paged attention over the KV cache, for prefill chunks and decode tokens in one call."""
