"""LoRA adapters: reading and validating PEFT directories, and the slab format they are packed into."""
