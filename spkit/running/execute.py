"""papermill's command line, which starts in half of the time: `python -m spkit.running.execute`.

The same arguments and the same result as of `python -m papermill`.
"""

import sys

from spkit.system.collector import paused

# jsonschema imports it where it is there, to check international addresses: nothing of a notebook's
# form. It builds a parser of all of them, which takes a second
sys.modules.setdefault("rfc3987_syntax", None)

with paused():
    from papermill.cli import papermill

if __name__ == "__main__":
    papermill()
