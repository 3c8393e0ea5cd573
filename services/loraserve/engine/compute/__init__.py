"""Running the model: what every runner offers, the CPU runner, and the sampler."""
