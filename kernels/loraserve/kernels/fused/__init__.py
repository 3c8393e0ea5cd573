"""Fused elementwise operations of a decoder layer, for CPU and GPU. Each makes one pass over memory."""
