"""The rules of the proxy: which requests may pass, which headers go which way, and who may call what.

* ``target``: a URL of fal's, parsed once into a frozen value
* ``paths``: the paths that every server reads alike
* ``headers``: the lists of headers that go to fal and come back, and how a response's head is read
* ``endpoints``: the one list of fal's hosts and paths, and which kind of call a target is, and whether it is paid
* ``policy``: the decision whether a request may pass, made from its head alone
* ``patterns``: the patterns of ``allowed_endpoints``
* ``access``: the operator's own rules, for targets and for the bodies of token requests
* ``cors``: which pages of other origins may read responses
* ``connect_to``: the addresses to connect to instead of fal's
* ``excerpt``: the part of a refused text that a log shows
* ``trusted_proxies``: the address of the client behind the operator's own proxies

Everything here is pure. A rule returns a value or raises one of the package's errors. No rule does I/O, logs, reads the
clock or the environment, or keeps anything of a request except cached parts of short header lines and addresses. Only
the standard library is used. A review of what the proxy lets through needs to read this folder and nothing else.
"""
