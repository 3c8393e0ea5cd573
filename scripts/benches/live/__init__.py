"""The parts of scripts/bench policies: one workload on a live cluster, under one policy after the other."""
