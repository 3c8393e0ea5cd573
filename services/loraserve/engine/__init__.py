"""The engine process: model, KV cache, adapter pool and scheduler."""
