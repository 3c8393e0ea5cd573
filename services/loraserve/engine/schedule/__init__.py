"""Decides which tokens each step computes, without a clock, I/O or tensors.

`Scheduler` (scheduler.py) is the entry point. It takes events and returns instructions, both defined in events.py. The
other modules serve it:

    sequence.py  one request: its states, transitions, tokens and stop conditions
    steps.py     forming the next step, preemption when KV blocks run out, the limit on overtaking, the steps in flight
    early.py     requests that start before their adapter has been read completely
    blocks.py    KV blocks and the prefix cache
    report.py    the load, counters, capabilities and measured speed that the engine reports
"""
