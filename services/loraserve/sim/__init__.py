"""A discrete-event simulator of a whole cluster, without sockets, models or real waiting times.

The router, the planner, the monitor's demand windows and the engines' schedulers are the production code. Only time is
simulated: steps and adapter loads take the time that the cost model of a profile predicts. Reading order: ``command``
(the command scripts/simulate), ``runs``, ``cluster``, ``engine``, ``planner``, ``policies``, ``compare``.
"""
