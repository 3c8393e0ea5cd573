"""The parts of scripts/bench faults: the cells of the table, the disturbed cluster, requests and results."""
