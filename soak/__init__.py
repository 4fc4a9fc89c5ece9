"""The service under all kinds of calls, aborts and faults, for as long as you like.

``python -m soak --seconds=3600`` starts the command and a stand-in for fal. At its end it reports the problems that it
found, what is left of the calls, and whether memory grew. The clients and the HTTPS server are those of the tests.
Nothing here is installed with the package.
"""
