"""The router: it chooses an engine for each request and refuses requests that no engine can start in time.

All modules except ``service`` are pure: no I/O, no clock and no global randomness. Reading order: ``service`` (the
process), ``context`` (input and output of a policy), ``policy`` (the decision: filter, score, admit, pick), ``score``,
``prices``, ``view``, ``engine_view``, ``prefixes``.
"""
