"""The parts of the bench ``policies``: one workload on a live cluster, under one policy after the other."""
