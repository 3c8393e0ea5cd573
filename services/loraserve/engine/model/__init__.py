"""Decoder models of the Llama, Mistral, Qwen2 and Qwen3 families, with a paged KV cache and LoRA adapters."""
