"""Exit with 0 if the proxy in this container answers ``/healthz``, on the port that its arguments or variables name.

An argument is the id of the proxy's process, which is 1 in a container. A port in a file of options is not seen here:
use FAL_PROXY_PORT or --port.
"""

import os
import re
import sys
from http.client import HTTPConnection
from pathlib import Path

DEFAULT_PORT = 8080
# Shorter than the time-out of HEALTHCHECK.
TIMEOUT_S = 4

process = sys.argv[1] if len(sys.argv) > 1 else "1"
arguments = Path("/proc", process, "cmdline").read_text()
named = re.findall(r"\0--port[=\0](\d+)", arguments) or [os.environ.get("FAL_PROXY_PORT") or DEFAULT_PORT]
try:
    connection = HTTPConnection("127.0.0.1", int(named[-1]), timeout=TIMEOUT_S)
    connection.request("GET", "/healthz")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"port {named[-1]}: {error}")
sys.exit(None if status == 200 else f"port {named[-1]}: status {status}")
