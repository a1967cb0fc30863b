"""Rehearsals of what must not go wrong in delivery: attacks, deaths, races, fleets of thousands.

The product's own publisher, rollouts and updaters act in them; what is stood in for are the server of the
object store (``bucket``: in memory or in a directory, shared by processes) and the passing of time.

bucket      an object store to do harm to
deliveries  bundles, robots and clocks
attacks     what an attacker, a fault or a race does to releases, and what must come of it
checkouts   a small checkout in which a turn takes seconds
reporting   a fleet that does what it is told to and reports it
killed      processes that are killed with SIGKILL at every step
fleet       thousands of robots in simulated time
bench       ``flywheel bench delivery`` and ``flywheel bench fleet``
"""
