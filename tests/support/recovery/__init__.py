"""Measure each fault on fal's side: its effect on clients, how soon it is over, and its traces in the service.

Strategy. The service is the command, and fal's place is taken by another process (programs/faulty_upstream.py). Some
thirty clients make short calls, long polls and event streams before, during and after a fault. Each call has a number
of its own, which tells afterwards whether the call reached the upstream. Then the clients leave, and the service must
have no more files, tasks and connections than before. One service goes through all faults of its protocol, because the
traces of one fault may show only in the next.

programs/recovery.py runs this in a process of its own, which test_recovery.py starts, in a network of its own for the
faults that need one.

The service waits for a few seconds where its own limits are tens of seconds. With TORNADO_FAL_PROXY_REAL_TIME=1 its own
limits count, and all faults together take minutes.
"""
