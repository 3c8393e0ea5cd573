"""All processes of a cluster on one machine: start, watch, restart, stop."""
