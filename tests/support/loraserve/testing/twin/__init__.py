"""The whole cluster in virtual time: the real services with faults drawn from a seed, checked against a known truth.

``schedule.py`` draws requests and faults, ``cluster.py`` runs them, ``checks.py`` judges the outcome, ``mutations.py``
plants bugs that the checks must find, and ``command.py`` runs ranges of seeds and shrinks what fails.
"""
