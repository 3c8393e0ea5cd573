"""One engine: the model, its KV cache and adapter pool, and the decisions of what each step computes."""
