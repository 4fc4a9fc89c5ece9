"""A stand-in for fal's service on loopback, to try the proxy and to test it with neither key nor network.

Strategy: one Tornado server with real TLS (HTTP/1.1) on 127.0.0.1 answers for all of fal's hosts, told apart by the
Host header; the proxy is pointed at it with libcurl's CONNECT_TO and verifies it against the sandbox's own CA. What a
job answers is a pure function of the time since it was accepted (``Job``), so there are no background tasks. The shapes
of the answers are those of fal's queue and storage pages (https://fal.ai/docs) and of what ``@fal-ai/client`` 1.10.1
reads. Its page and the CDN's stand-in (``Sandbox.page_rules``) live in the proxy's own application.

A caller steers it by the input field ``sandbox``, an object (as a query argument of a GET: its JSON text) of:

=========== ===========================================================================================================
``tag``     names the job in ``Sandbox.executions``; calls without a tag are counted, and fail, together under ``""``
``error``   answer this status, 400 to 599 (422 with fal's list of details), at once and without executing anything
``times``   how many calls of that tag fail before the next succeeds; without it every one does
``at``      which step fails: ``call`` (default: run, stream or submit), or the queued job's ``status`` or ``result``
``think_s`` seconds, not scaled by ``pace``: of a run, before a stream's first event, or of a queued job's whole life
``text``    what a stream says, instead of its polyglot default
=========== ===========================================================================================================

For example ``{"prompt": "a cat", "sandbox": {"error": 503, "times": 1, "tag": "abc"}}`` fails once and then works.
After a cancel the job's status is COMPLETED and its result a 499; fal's pages do not say, so that is a guess.

It opens no connection, listens on loopback only, logs no access, and keeps a bounded number of jobs and files.
"""

from tornado_fal_proxy.sandbox.server import Sandbox

__all__ = ["Sandbox"]
