"""The command: the proxy as a service of its own. An application that mounts the handler never imports this package.

A map:

* ``command`` starts the service and returns its exit code; ``options`` gathers what ``arguments``, environment,
  ``env_file`` and ``config_file`` say to the ``settings``, and ``reload`` does it again on SIGHUP. ``describe`` tells
  what they open and limit, and ``completion`` makes scripts for shells.
* ``process`` is the life of a process that serves; ``application`` is the Tornado application in it.
* ``server``, ``connection`` and ``limits`` accept, read and close clients' connections.
* ``trimming`` gives memory back when a crowd has gone.
* ``supervisor`` is the parent of several ``worker`` processes, which share a ``scoreboard``.
* ``systemd``, ``admin``, ``metrics``, ``access_log`` and ``log_output`` are for those who operate the service.
"""

from tornado_fal_proxy.service.command import main

__all__ = ["main"]
