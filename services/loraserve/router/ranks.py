"""Which rank an engine's batches have, of the copies that it keeps. Pure."""

from collections.abc import Mapping
from itertools import pairwise
from math import expm1


def largest_at_a_time(sequences: Mapping[int, float]) -> float:
    """The largest rank in a batch, on average over time; ``sequences``: by rank, how many of it decode at a time.

    They are taken to come independently: none of rank r or more is there for exp(-n) of the time, n being all of these
    (Poisson), and the mean of the largest is the integral over r of the time that there is one.
    """
    above, largest = 0.0, 0.0
    for rank, below in pairwise([*sorted(sequences, reverse=True), 0]):
        above += sequences[rank]
        largest -= (rank - below) * expm1(-above)
    return largest
