"""Imports without Python's garbage collector: what they make stays, and is not looked through.

    with paused():
        import torch, peft

The libraries of a notebook make a million objects. The collector would look through all of them
several times while they are made, and once more when the process ends: 3 of the 7.6 seconds of
processor time that importing and ending take.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collection inside; what is there at its end is left alone by all later ones.

    Afterwards garbage is collected as before. Nothing else changes: what nobody refers to is freed
    at once, as always, and only circles of objects wait for the collector.
    """
    usual = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if usual:
            gc.enable()
