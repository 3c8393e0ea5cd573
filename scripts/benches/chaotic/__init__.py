"""The parts of scripts/bench chaos: engines, disturbances, requests, expected output, counts."""
