"""The CUDA runner: memory, weights, captured graphs and sampling on one GPU."""
