"""The one exception type that the kit raises for a mistake a user can mend."""


class SpkitError(ValueError):
    """A single sentence: what was found, where (key, file, row or tensor), and what is allowed."""
