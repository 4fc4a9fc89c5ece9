"""The rows of the table, each a module with its strategy, its measures and its targets."""

from benchmarks.rows import (
    cpu,
    crowd,
    growth,
    held,
    idle,
    latency,
    processes,
    short,
    spending,
    streams,
    stuck,
    telemetry,
    throughput,
)

__all__ = ["ROWS"]

ROWS = tuple(
    module.ROW
    for module in (
        *(cpu, latency, idle, held, crowd, short, growth, stuck, streams, throughput, processes),
        *(telemetry, spending),
    )
)
