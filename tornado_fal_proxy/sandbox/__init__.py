"""A stand-in for fal.ai on loopback, to try the proxy and to test it with neither key nor network.

Strategy: one Tornado server with real TLS (HTTP/1.1) on 127.0.0.1 responds in place of all of fal's hosts, told apart
by the Host header. The proxy is pointed at it with libcurl's CONNECT_TO and verifies it against the sandbox's own CA.
The state of a job is a pure function of the time since it was accepted (``Job``), so there are no background tasks. The
shapes of the responses are those of fal's documentation of its queue and storage (https://fal.ai/docs), and those that
fal's JavaScript SDK (``@fal-ai/client`` 1.10.1) reads. The sandbox's page and the stand-in for fal's CDN
(``Sandbox.page_rules``) are served by the application of the proxy itself.

A client controls it with the input field ``sandbox``, an object (as a query argument of a GET: its JSON text) of:

=========== ===========================================================================================================
``tag``     names the job in ``Sandbox.executions``; calls without a tag are counted, and fail, together under ``""``
``error``   respond with this status, 400 to 599 (422 with fal's list of details), at once and without executing a job
``times``   how many calls with that tag fail before the next succeeds; without it every call fails
``at``      which step fails, ``call`` (default; run, stream or submit) or the queued job's ``status`` or ``result``
``think_s`` seconds, not scaled by ``pace``: of a run, before a stream's first event, or of a queued job's whole life
``text``    the text of a stream, instead of the default one in several scripts
=========== ===========================================================================================================

For example ``{"prompt": "a cat", "sandbox": {"error": 503, "times": 1, "tag": "abc"}}`` fails once and then works.
After a cancel the status of a job is COMPLETED and its result a 499, which is a guess: fal's documentation is silent.

The sandbox opens no connection, listens on loopback only, writes no access log, keeps a bounded number of jobs and
files, and imports nothing from the rest of the package.
"""

from tornado_fal_proxy.sandbox.server import Sandbox

__all__ = ["Sandbox"]
