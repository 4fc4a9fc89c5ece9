"""Tell how to install an extra. The package is on no index, so a command with its name alone would fetch another's."""

__all__ = ["install"]


def install(extra: str) -> str:
    """Return how to install that extra, from a checkout or from a wheel."""
    return f"pip install '.[{extra}]' in the folder of this project, or pip install 'FILE.whl[{extra}]' with its wheel"
