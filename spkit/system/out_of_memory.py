"""Out of memory in one sentence: what ran out, how much was asked, and what to lower.

    with explained("deriving the SE patch", {"derivation.micro_batch_size": 8}):
        ...

It predicts nothing and tries nothing again: what was finished is on disk, the user runs again.
"""

import errno
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spkit.errors import SpkitError

GPU = re.compile(r"(?:CUDA|MPS)[\w ]*:? out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
WHICH = re.compile(r"\bGPU (\d+)")
HOST = re.compile(
    r"can(?:'|no)t allocate memory|not enough memory|unable to (?:allocate|mmap)", re.IGNORECASE
)
AMOUNT = r"([\d.]+ ?(?:bytes|[KMGTPE]iB))"
ASKED = re.compile(rf"(?:tried to allocate|unable to allocate) {AMOUNT}", re.IGNORECASE)
TOTAL = re.compile(rf"total capacity of {AMOUNT}")
FREE = re.compile(rf"{AMOUNT} is free|{AMOUNT} free")


@contextmanager
def explained(what: str, lower: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of too little memory, on the GPU or the host, into one SpkitError.

    what: what was being done ("deriving the SE patch"). lower: the parameters that need less memory
    when lowered, with their present values; a flag is one to set, and what cannot go lower (a batch
    of 1, a flag that is set) is left out. All other errors pass as they are.
    """
    try:
        yield
    except Exception as error:
        place = _what_ran_out(error)
        if place is None:
            raise
        message = f"{place} ran out of memory while {what}{_amounts(str(error))}: {_advice(lower)}"
        # the tensors of the frames that failed would stay in memory with the traceback
        traceback.clear_frames(error.__traceback__)
        empty_cache()
        raise SpkitError(message) from error


def _what_ran_out(error: Exception) -> str | None:
    torch = sys.modules.get("torch")  # without it, none of its errors
    text = str(error)
    if (torch and isinstance(error, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and GPU.search(text)
    ):
        which = WHICH.search(text)  # there may be several
        return f"the GPU cuda:{which[1]}" if which and torch.cuda.device_count() > 1 else "the GPU"
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and HOST.search(text))
    ):
        return "the host (not the GPU)"
    return None


def _amounts(text: str) -> str:
    asked, free, total = ASKED.search(text), FREE.search(text), TOTAL.search(text)
    parts = [f"{_readable(asked[1])} asked"] if asked else []
    if free:
        of = f" of {_readable(total[1])}" if total else ""
        parts.append(f"{_readable(free[1] or free[2])}{of} free")
    return f" ({', '.join(parts)})" if parts else ""


def _readable(amount: str) -> str:
    """Bytes in GiB; other units as they are."""
    number = amount.removesuffix("bytes").strip()
    return f"{float(number) / 2**30:,.2f} GiB" if amount.endswith("bytes") else amount


def _advice(lower: Mapping[str, Any]) -> str:
    lowered, set_to = [], []
    for key, value in lower.items():
        if value is None:
            set_to.append(f"{key} (now null)")
        elif value is False:
            set_to.append(f"{key}: true")
        elif isinstance(value, str):
            set_to.append(f"{key} (now {value}) to one that needs less")
        elif value is not True and value != 1:
            lowered.append(f"{key} (now {value})")
    options = [f"lower {' or '.join(lowered)}"] if lowered else []
    options += [f"set {' or '.join(set_to)}"] if set_to else []
    advice = ", or ".join(options) or "take a smaller backbone or a machine with more memory"
    return f"{advice}, then run again: what is finished is kept"


def empty_cache() -> None:
    """Give back what torch keeps of freed memory on any GPU."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch and torch.backends.mps.is_available():
        torch.mps.empty_cache()
