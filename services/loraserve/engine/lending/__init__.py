"""Lending of slabs to peers: leases on this engine's memory, and the transports that peers read it over."""
