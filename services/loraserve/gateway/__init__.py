"""The gateway: HTTP, tokenizer and chat template, detokenizing, server-sent events."""
