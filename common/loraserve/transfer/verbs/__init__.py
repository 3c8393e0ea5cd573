"""Transport by one-sided RDMA reads (InfiniBand verbs)."""
