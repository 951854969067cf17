"""Named tensors and a header in one safetensors file, as patches, sets and importances are kept."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spkit.errors import SpkitError
from spkit.system.files import atomic


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, header: Mapping[str, Any] | None = None
) -> None:
    """Write the file whole or not at all; the same tensors and header give the same bytes.

    header: anything that JSON can hold. SpkitError for a full disk or a read-only folder.
    """
    # one metadata key: safetensors writes several in no fixed order, and bytes must repeat
    text = None if header is None else {"spkit": json.dumps(header, sort_keys=True)}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=text)


def load_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], Any]:
    """(tensors, header) of what `save_tensors` wrote; None is the header where there is none.

    SpkitError, naming the file and `what` was expected, where it is missing or unreadable.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("spkit", "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise SpkitError(f"{path} cannot be read as {what}: {error}") from error
