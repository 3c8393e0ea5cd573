"""LoRA adapters: reads and validates PEFT directories, and packs each adapter into one array (a slab)."""
