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
        self._issued: dict[tuple[tuple[str, ...], bool], trustme.LeafCert] = {}
        self.ca_file = str(directory / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca_file)

    def context(self, *names: str, expired: bool = False) -> ssl.SSLContext:
        """Return a server's new context with a certificate for `names`, by default fal's. Clients need none."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._certificate(names or FAL_NAMES, expired).configure_cert(context)
        return context

    def write_certificate(self, path: Path, *names: str) -> None:
        """Write key and certificate of a server of these names, by default fal's, to one file for another process."""
        self._ca.issue_cert(*names or FAL_NAMES).private_key_and_cert_chain_pem.write_to_path(str(path))

    def _certificate(self, names: tuple[str, ...], expired: bool) -> trustme.LeafCert:
        if (names, expired) not in self._issued:
            yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
            self._issued[names, expired] = self._ca.issue_cert(*names, not_after=yesterday if expired else None)
        return self._issued[names, expired]
