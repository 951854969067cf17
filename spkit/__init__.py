"""spkit: the small helper package behind the SafePatching notebooks (arXiv 2405.13820)."""

__version__ = "0.1.0"
