"""The command ``tornado-fal-proxy doctor URL``: look at a proxy from outside, as a browser reaches it.

A map:

* ``command`` reads the arguments, and prints the findings
* ``visitor`` sends one request, and notes how the response came
* ``checks`` look at one thing each, and ``route`` at the first of them: whether the proxy is there at all
* ``findings`` is the form of each result
* ``inside`` asks fal itself, with the key of this machine
"""
