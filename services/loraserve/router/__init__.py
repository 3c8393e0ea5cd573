"""The router: admission, and the choice of an engine for every request.

All modules but ``service`` are pure: no I/O, no clock and no global randomness. Reading order: ``context`` (what a
policy is given and answers), ``policy`` (the decision), ``score``, ``prices``, ``view``, ``engine_view``, ``prefixes``.
"""
