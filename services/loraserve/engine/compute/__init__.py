"""Model execution: the Runner protocol, the CPU runner and the sampler."""
