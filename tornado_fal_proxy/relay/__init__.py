"""Hold what the request handler is made of.

* ``response``: how a response leaves Tornado, whole or as a stream, and how it is aborted
* ``backend``: what handlers of one configuration share: connections to fal, slots, the sweep of slow bodies
* ``hooks``: how functions of the operator's are asked
* ``paying``: a call against the limits on spending
* ``diagnostics``: responses for a doctor, which never reach fal
* ``hangup``: notices clients that leave
"""
