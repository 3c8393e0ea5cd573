"""LoRA adapters as bytes: the model shape they fit, the slab they are packed into, their validation."""
