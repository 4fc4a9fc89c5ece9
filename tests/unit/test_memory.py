"""The memory that a process may have, and the part of it that calls may fill."""

import os
from pathlib import Path

import pytest

from tornado_fal_proxy import memory
from tornado_fal_proxy.config import MIN_BUFFERED_BYTES
from tornado_fal_proxy.service.process import buffer_share

# The content of /proc/self/cgroup, the files of limits, and the smallest limit.
GROUPS = [
    ("0::/\n", {"memory.max": "max"}, None),
    ("0::/a/b\n", {"a/memory.max": "3000000", "a/b/memory.max": "max"}, 3_000_000),
    ("0::/a/b\n", {"a/memory.max": "9000000", "a/b/memory.max": "4000000"}, 4_000_000),
    ("4:memory:/a\n2:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "5000000"}, 5_000_000),
    ("2:cpu:/a\n", {}, None),
    ("0::/gone\n", {}, None),
]


@pytest.mark.parametrize(("groups", "files", "limit"), GROUPS)
def test_the_limit_of_a_control_group_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    """The smallest limit of the groups that a process is in bounds its memory, whichever version they have."""
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "cgroup")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.available_bytes() == (machine if limit is None else limit)


def test_processes_share_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the memory is divided among the processes, and each may buffer the least that the option allows."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 800_000_000)
    assert [buffer_share(count) for count in (1, 2, 4)] == [200_000_000, 100_000_000, 50_000_000]
    assert buffer_share(1000) == MIN_BUFFERED_BYTES
