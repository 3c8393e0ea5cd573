"""Decides what each step computes. Pure: no clock, no I/O, no tensors.

`Scheduler` (scheduler.py) is the entry point: it takes the events of events.py and returns the instructions of
events.py. The other modules serve it:

    sequence.py    one request: its states and transitions, its tokens, when it stops
    steps.py       which tokens the next step computes; preemption when KV blocks run out; the steps in flight
    overtaking.py  how long a request that waits for its adapter may be overtaken by later ones
    early.py       requests that start before their adapter has been read completely
    blocks.py      KV blocks and the prefix cache
    report.py      the load, counters, capabilities and measured speed that the engine reports
"""
