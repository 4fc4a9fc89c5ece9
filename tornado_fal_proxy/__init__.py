"""A proxy for fal.ai as a Tornado request handler. See README.md.

An embedding application needs two names::

    from tornado_fal_proxy import FalProxyHandler, ProxyConfig

    Application([(r"/api/fal/proxy", FalProxyHandler, {"config": ProxyConfig(max_in_flight=1000)})])

A map of the package, for its readers:

* At the top stands what an embedder meets. ``handler`` decides about a request and relays it, ``config`` holds every
  option (``option_fields`` makes one), ``credentials`` finds the key, ``errors`` lists every way in which a call can
  fail, ``telemetry`` has the ``Call`` that ``on_call_end`` receives, ``logs`` has formatters, ``memory`` settings for a
  process of one's own. ``webhooks`` receives fal's webhooks.
* ``rules/`` decides, without I/O, clock or logging: what a target is (``target``, ``endpoints``), whether a call may
  pass (``policy``, ``access``, ``patterns``), which headers go which way (``headers``), which pages may read a
  response (``cors``), who the client is behind a proxy (``trusted_proxies``).
* ``upstream/`` talks to fal through libcurl, which nothing else knows.
* ``relay/`` is what the handler is made of: how a response leaves, and what handlers share.
* ``spending/`` counts what each user spends: plans, prices, the life of a paid call, and stores.
* ``service/`` is the command ``tornado-fal-proxy``: options, processes, connections of clients, logs, metrics. An
  embedder never imports it.
* ``doctor/`` looks at a proxy from outside, and says what is wrong with what stands in front of it.
* ``sandbox/`` is a stand-in for fal, to try the proxy without a key and without a network.
"""

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.handler import FalProxyHandler
from tornado_fal_proxy.relay.backend import close_upstreams, flush_spending
from tornado_fal_proxy.rules.target import Target
from tornado_fal_proxy.telemetry import Call

__all__ = [
    "Call",
    "ConfigError",
    "FalProxyHandler",
    "ProxyConfig",
    "Target",
    "__version__",
    "close_upstreams",
    "flush_spending",
]
