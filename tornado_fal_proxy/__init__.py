"""A proxy for fal.ai as a Tornado request handler. See README.md.

An embedding application needs two names::

    from tornado_fal_proxy import FalProxyHandler, ProxyConfig

    Application([(r"/api/fal/proxy", FalProxyHandler, {"config": ProxyConfig(max_in_flight=1000)})])
"""

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.handler import FalProxyHandler, close_upstreams
from tornado_fal_proxy.policy import Target

__all__ = ["ConfigError", "FalProxyHandler", "ProxyConfig", "Target", "__version__", "close_upstreams"]
