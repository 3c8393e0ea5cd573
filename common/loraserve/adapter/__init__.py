"""LoRA adapters: reads and validates PEFT directories, and defines the slab format of packed adapters."""
