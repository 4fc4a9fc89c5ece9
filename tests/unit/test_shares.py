"""Which worker takes a new connection."""

import pytest

from tornado_fal_proxy.service.server import fair_share

SHARES = [
    # mine, fewest of the others, how many may be taken
    (0, None, 128),
    (500, None, 128),
    (0, 0, 1),
    (1, 0, 0),
    (1, 1, 1),
    (8, 8, 3),
    (10, 8, 1),
    (11, 8, 0),
    (11, 9, 1),
    (0, 4000, 128),
]


@pytest.mark.parametrize(("mine", "fewest", "share"), SHARES)
def test_share(mine: int, fewest: int | None, share: int) -> None:
    """A worker takes up to a quarter and one more than the worker that has fewest. Alone it takes all."""
    assert max(0, fair_share(mine, fewest)) == share
