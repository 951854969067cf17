"""What a method is called where it is shown: one name, one method.

Result files call the run's own method "SafePatching", whatever its parameters. With
`patching.balance` set, alpha is found on D_h, and it is shown as "SafePatching, balanced", which is
also its name in the comparison (notebook 05). There, "SafePatching" has a fixed alpha.
"""

from typing import TypeVar

import pandas as pd

from spkit.config import PatchingConfig
from spkit.method import NAME as SAFEPATCHING

BALANCED = f"{SAFEPATCHING}, balanced"
# where a run also has the method "balanced" of the continual study, with a setting of its own
OF_THE_RUN = f"{BALANCED} (of `patching`)"
COLUMNS = ("model", "method", "variant")  # where tables name a method

Shown = TypeVar("Shown", str, pd.DataFrame, pd.Series)


def labelled(shown: Shown, patching: PatchingConfig) -> Shown:
    """A name, or a frame with names, as it is to be shown; the same where alpha is fixed.

    shown: one name; or a frame or series, of which the index and the columns "model", "method" and
    "variant" are renamed in a copy. Never write the copy into a result file.
    """
    if patching.balance is None:
        return shown
    if isinstance(shown, str):
        return BALANCED if shown == SAFEPATCHING else shown
    columns = [name for name in COLUMNS if name in shown] if isinstance(shown, pd.DataFrame) else []
    levels = [shown.index.get_level_values(level) for level in range(shown.index.nlevels)]
    taken = any((names == BALANCED).any() for names in (*levels, *(shown[c] for c in columns)))
    label = OF_THE_RUN if taken else BALANCED
    made = shown.rename(index={SAFEPATCHING: label})
    for name in columns:
        made[name] = [label if value == SAFEPATCHING else value for value in shown[name]]
    return made
