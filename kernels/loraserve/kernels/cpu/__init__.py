"""Common code of the CPU kernels: compilation, operand blocks, threads and vector code."""
