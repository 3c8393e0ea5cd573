"""The gateway: HTTP API, tokenizer, chat template, detokenizer and server-sent events."""
