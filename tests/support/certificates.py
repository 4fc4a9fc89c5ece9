"""The one certificate authority of the tests, of fuzzing and of soaks."""

import datetime
import ssl
from pathlib import Path

import trustme

__all__ = ["FAL_NAMES", "Authority"]

FAL_NAMES = ("fal.run", "*.fal.run", "fal.ai", "*.fal.ai", "rest.alpha.fal.ai")


class Authority:
    """A certificate authority of the test's own, made in `directory`. Clients that have its `ca_file` trust it."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self.ca_file = str(directory / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca_file)

    def context(self, *names: str, expired: bool = False) -> ssl.SSLContext:
        """Return a server's context with a new certificate for `names`, by default fal's. Clients need none."""
        yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        certificate = self._ca.issue_cert(*names or FAL_NAMES, not_after=yesterday if expired else None)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(context)
        return context

    def write_certificate(self, path: Path, *names: str) -> None:
        """Write key and certificate of a server of these names, by default fal's, to one file for another process."""
        self._ca.issue_cert(*names or FAL_NAMES).private_key_and_cert_chain_pem.write_to_path(str(path))
