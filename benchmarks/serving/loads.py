"""Loads of an open loop: published traces, and arrivals that are drawn."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rayapp.simulation.traces import SHAPES, Arrival, drawn, in_bursts, read_trace, scaled


def add_lengths(options: ArgumentParser) -> None:
    """Options of the lengths of requests, and of what servers hold."""
    options.add_argument("--requests", type=int, default=1000, help="of every load, about")
    options.add_argument("--divisor", type=int, default=8, help="of the lengths")
    options.add_argument("--max-num-seqs", type=int, default=32)
    options.add_argument("--max-model-len", type=int, default=2048)
    options.add_argument("--limits", type=float, nargs=2, default=[2.0, 0.1], help="TTFT, TPOT, s")
    options.add_argument("--timeout", type=float, default=300.0, help="seconds of silence")


def drawn_load(arguments: Namespace, shape: str = "poisson") -> list[Arrival]:
    """About as many drawn arrivals as there are to be requests, one a second on average."""
    count = float(arguments.requests)
    arrivals = drawn(shape, per_s=1.0, span_s=count, seed=arguments.seed)
    return scaled(arrivals, arguments.divisor, arguments.max_model_len)


def loads_of(arguments: Namespace) -> dict[str, list[Arrival]]:
    """The traces that were given by their files' names, then the drawn loads.

    Args:
        arguments: Options: trace, loads, burst, and those of :func:`add_lengths`.
    """
    loads = {
        path.stem: scaled(
            read_trace(path, arguments.requests), arguments.divisor, arguments.max_model_len
        )
        for path in arguments.trace
    }
    loads |= {shape: drawn_load(arguments, shape) for shape in arguments.loads}
    if not loads:
        loads = {"poisson": drawn_load(arguments)}
    if arguments.burst > 1:
        first = next(iter(loads))
        loads[f"{first}, {arguments.burst} at once"] = in_bursts(loads[first], arguments.burst)
    return loads


SHAPE_NAMES = tuple(SHAPES)
