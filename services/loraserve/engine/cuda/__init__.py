"""The model runner for one CUDA GPU: memory, weights, captured graphs and sampling."""
