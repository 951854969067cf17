"""The hub, asked before any work: can it be reached, and is what the parameters name there?

    reachable()                        whether it answers within a few seconds; asked once a process
    problem("owner/name", "model")     one sentence, or None where all is well

What is in the hub's cache on this machine needs no network. Nothing is downloaded here.
"""

from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Thread

from spkit.errors import needs

SECONDS = 4  # for an answer; a name server that is not there can take much longer
_SILENT: list[str] = []  # what it did not answer; then it is asked nothing more, for time adds up


@cache
def reachable() -> bool:
    """Whether the hub answers; False, without asking, where HF_HUB_OFFLINE is set."""
    with needs("A name on the hub", "hub"):
        from huggingface_hub import constants, get_session
    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask() -> None:
        with suppress(Exception):  # whatever the session is built on raises what it likes
            answers.append(get_session().head(constants.ENDPOINT, timeout=SECONDS))

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return bool(answers)


def in_cache(name: str, revision: str | None = None, kind: str = "model") -> Path | None:
    """The snapshot's folder in the hub's cache on this machine, whole or not; None: there is none.

    kind: "model" or "dataset".
    """
    with needs("A name on the hub", "hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    try:
        options = {"revision": revision, "repo_type": kind, "local_files_only": True}
        return Path(snapshot_download(name, **options))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def problem(name: str, kind: str, revision: str | None = None) -> str | None:
    """Why this model or data set of the hub cannot be had now, in one sentence; None where it can.

    A wrong name, a revision that is not there, a gated one without a login, no network.
    """
    what = f"{name!r} is not on this machine"
    if _SILENT or not reachable():
        return f"{what}, and the hub cannot be reached from here"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=SECONDS)
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return f"{what}, and it is gated: accept its terms on its page, then `hf auth login`"
    except RepositoryNotFoundError:
        return f"{what}, and the hub has no {kind} of this name (or it is private: log in)"
    except RevisionNotFoundError:
        return f"{what}, and the hub's has no revision {revision!r}"
    except (HfHubHTTPError, OSError, ValueError) as error:
        return f"{what}, and the hub says: {str(error).splitlines()[0]}"
    except Exception:  # of whatever the session is built on: too late, or cut off
        _SILENT.append(name)
        return f"{what}, and the hub cannot be reached from here"
    return None
