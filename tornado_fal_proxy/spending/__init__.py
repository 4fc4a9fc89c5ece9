"""Limit how much each user may spend, and keep an account of what they have spent.

Strategy. A paid call is a job. It is reserved in a :class:`~tornado_fal_proxy.spending.store.Store` before anything
leaves for fal, with an estimate of its price. It is given back if it certainly did not run, and settled once when its
bill is known. An unknown bill keeps the estimate. The store decides alone and at once for all processes, so two calls
never get the last job of a day.
"""
