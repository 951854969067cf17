"""spkit: the SafePatching kit (arXiv 2405.13820). The names below are its small door, api.py."""

import importlib
import logging

# on import bitsandbytes warns about a kernel for the very path that models/weights.py closes
# (guard_nf4); peft imports it, too, so the place is before any module of ours
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["generate", "load", "patched", "safepatch", "sandbox_backbone", "sandbox_pairs"]


def __getattr__(name: str):
    """The functions of api.py, imported when they are asked for: importing spkit stays light."""
    if name in __all__:
        return getattr(importlib.import_module("spkit.api"), name)
    raise AttributeError(f"module 'spkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
