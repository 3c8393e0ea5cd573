"""What all CPU kernels are built from: compilation, operand blocks, threads and vector code. See the README above."""
