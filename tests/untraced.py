"""Code that coverage does not follow: its tracer is called for every line of every library."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def part() -> Iterator[None]:
    """No tracing by coverage inside, in this thread; afterwards it goes on. Without it, nothing."""
    tracer = sys.gettrace()
    ours = hasattr(tracer, "stop")  # and no debugger's
    if ours:  # its own methods: with sys.settrace it would lose count of the frames it is in
        tracer.stop()
    try:
        yield
    finally:
        if ours:
            tracer.start()
