"""Search for the fastest block sizes of the GPU kernels: scripts/tune_kernels."""
