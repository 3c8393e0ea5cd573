"""The elementwise operations between the matrix products, each in one pass over memory, for CPU and GPU."""
