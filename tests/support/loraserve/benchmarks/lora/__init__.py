"""What the GPU kernels' bench and tuner share: steps over adapters of given ranks, their floors, their times."""
