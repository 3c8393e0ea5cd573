"""Several hosts on one machine, as network namespaces, and the faults of the network between them."""
