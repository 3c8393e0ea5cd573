"""A discrete-event simulator of a whole cluster, without sockets, models or waiting.

The router, the planner, the monitor's demand windows and the engines' schedulers are the live code. Only time is
simulated: steps and adapter loads take as long as a profile's cost model says. Reading order: ``command`` (what
scripts/simulate does), ``runs``, ``cluster``, ``engine``, ``planner``, ``policies``, ``compare``.
"""
