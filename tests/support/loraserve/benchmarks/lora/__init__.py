"""LoRA kernels on a GPU, timed beside the memory floor and beside vLLM's and SGLang's kernels."""
