"""Text and tokens: the tokenizer, incremental detokenization and stop strings."""
