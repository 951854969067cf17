"""A stage a file: `measure(bench)` checks that the ways agree, then times them in turn."""

from importlib import import_module

NAMES = (
    "importance",
    "top_sets",
    "derivation",
    "evaluation",
    "settings",
    "memory",
    "apply",
    "growth",
)


def measure(bench) -> None:
    """Measure the stage that `bench` is for."""
    import_module(f"{__name__}.{bench.stage}").measure(bench)
