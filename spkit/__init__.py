"""spkit: the small helper package behind the SafePatching notebooks (arXiv 2405.13820)."""

import logging

# on import bitsandbytes warns about a kernel for the very path that backbone.guard_nf4 closes;
# peft imports it, too, so the place is before any module of ours
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
