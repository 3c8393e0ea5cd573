"""Decoder models of the Llama, Mistral, Qwen2 and Qwen3 families over paged KV, with mixed adapters in one batch."""
