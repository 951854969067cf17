"""Add dense deltas to a checkpoint, without a patch file in between: where every weight changes.

weight' = round(float32(weight) + delta)        a delta of 0 leaves the weight's bits
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import headers
from spkit.models.stored_names import stored_names
from spkit.patchfile import floats
from spkit.patchfile.stream import Streamed, stream


def add_deltas(
    source: str | Path,
    deltas: Mapping[str, Any],
    folder: str | Path,
    *,
    identity: str,
    progress: bool = True,
) -> Streamed:
    """Write `source` + deltas to the new folder `folder`, tensor by tensor, whole or not at all.

    deltas: {tensor name: float32 [out, in]} (torch on the CPU or numpy), read one at a time a
    thread. identity: names the deltas; a folder that was cut is resumed for the same ones alone.
    Equal bit for bit to models/deltas.add_delta in memory. The result's `count` is the number of
    non-zero deltas that change nothing in the checkpoint's dtype. SpkitError for a tensor that the
    checkpoint does not have, another shape, a dtype that is no float, or a sum that is not finite.
    """
    found = headers(source)
    stored = stored_names(dict.fromkeys(deltas), found, source)
    edits = {
        there: partial(Adding, deltas, name, found[there][2]) for name, there in stored.items()
    }
    about = {"command": "add", "deltas": identity}
    return stream(source, edits, folder, identity=about, progress=progress, label="write")


class Adding:
    """The edit of one tensor: add the next part of its delta to each block."""

    def __init__(self, deltas: Mapping[str, Any], name: str, about: Mapping[str, Any]):
        delta = np.asarray(deltas[name], dtype=np.float32)
        if list(delta.shape) != about["shape"]:
            what = f"it has the shape {list(delta.shape)}, the checkpoint's is {about['shape']}"
            raise SpkitError(f"The delta of {name!r} cannot be added: {what}.")
        self.name, self.dtype = name, about["dtype"]
        self.left, self.lost = delta.reshape(-1), 0

    def block(self, bits: np.ndarray) -> np.ndarray:
        part, self.left = self.left[: len(bits)], self.left[len(bits) :]
        try:
            after = floats.patched(bits, part, self.dtype)
        except ValueError as error:
            raise SpkitError(f"The delta of {self.name!r} cannot be added: {error}.") from None
        self.lost += int(((after == bits) & (part != 0)).sum())
        return after

    def close(self) -> int:
        return self.lost
