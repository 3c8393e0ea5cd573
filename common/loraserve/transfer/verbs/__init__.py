"""Transport over RDMA (InfiniBand verbs) with one-sided reads."""
