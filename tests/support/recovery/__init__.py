"""What clients see of each fault of fal's side, how soon it is over, and what of it stays in the service.

Strategy. The service is the command, and what stands in fal's place a process too (programs/faulty_upstream.py). Some
thirty clients make short calls, long polls and event streams before a fault, during it and after it, each call with a
number of its own, by which what reached the upstream is known afterwards. Then the clients go, and the service must
hold what it held before. One service goes through all faults of its protocol, to show in the next what one leaves
behind.

programs/recovery.py runs this in a process of its own, which test_recovery.py starts, in a network of its own for the
faults that need one.

Where the service waits for tens of seconds it is told to wait for a few. With TORNADO_FAL_PROXY_REAL_TIME=1 its own
times count, and all of it takes minutes.
"""
