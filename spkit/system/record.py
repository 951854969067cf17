"""The record beside a result: what it was made from, by which versions, in how many seconds.

It is written last, so a result is complete where its record is there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spkit.system.files import atomic
from spkit.system.machine import hardware, versions


def is_made_from(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the record is there and names the same identity, which JSON can hold."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record.get("identity") == json.loads(json.dumps(identity))


def write_record(path: Path, identity: Mapping[str, Any], seconds: float) -> None:
    """Write it, whole or not at all."""
    record = {
        "identity": identity,
        "versions": versions(),
        "hardware": hardware(),
        "seconds": round(seconds, 1),
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
