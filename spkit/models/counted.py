"""Which files of a folder decide what is read from it: weights, settings, tokenizer, data.

    checkpoint_files("llama")     {"config.json": path, "model.safetensors": path, ...}
    adapter_files("my_adapter")   {"adapter_config.json": path, "adapter_model.safetensors": path}
    data_files("tasks")           every file but the hidden and the left-over ones

What else is there may come and go: a `.git`, the cache of a download, a card, a copy that an editor
left, weights in another format. Nothing is read here but the index of the weights, and a folder
that is no checkpoint is no error.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from spkit.models.checkpoint_files import INDEX, SINGLE
from spkit.system import fingerprint

CHECKPOINT = (
    *("config.json", "generation_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*.txt"),
    *("*.model", "*.spm", "*.bpe", "*.tiktoken", "tekken.json"),
    *("chat_template*.jinja", "chat_template*.json"),
)
TEMPLATES = "additional_chat_templates"  # a folder beside the tokenizer
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
LEFT_OVER = ("*~", "#*#", "*.swp", "*.swo", "*.bak", "*.orig", "*.tmp", "*.lock", "*.incomplete")
LEFT_OVER_FOLDERS = ("__pycache__", "__MACOSX")
LEFT_OVER_FILES = ("Thumbs.db", "desktop.ini")


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """{name: path}: settings, tokenizer, and the safetensors files that are in use.

    An adapter that lies in the folder counts, for transformers adds it to the weights.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_file()]
    found = [n for n in names if _like(n, (*CHECKPOINT, *ADAPTER)) and not is_left_over(Path(n))]
    found += [INDEX] * (INDEX in names) + _weights(folder, names)
    templates = [f"{TEMPLATES}/{p.name}" for p in (folder / TEMPLATES).glob("*.jinja")]
    return {name: folder / name for name in sorted({*found, *templates})}


def adapter_files(folder: str | Path) -> dict[str, Path]:
    """{name: path} of a PEFT adapter."""
    return {name: Path(folder, name) for name in ADAPTER if Path(folder, name).is_file()}


def data_files(place: str | Path) -> dict[str, Path]:
    """{name from the folder: path} of a folder of data or tasks; of a file {"": path}."""
    place = Path(place)
    if place.is_file():
        return {"": place}
    files = {path.relative_to(place): path for path in place.rglob("*") if path.is_file()}
    return {n.as_posix(): p for n, p in sorted(files.items()) if not is_left_over(n)}


def is_left_over(name: Path) -> bool:
    """Whether a file, named from the folder that is read, decides nothing: hidden, or a left-over
    of an editor, a download or Python."""
    hidden = any(part.startswith(".") or part in LEFT_OVER_FOLDERS for part in name.parts)
    card = name.name.partition(".")[0].upper() in ("README", "LICENSE", "LICENCE")
    return hidden or card or name.name in LEFT_OVER_FILES or _like(name.name, LEFT_OVER)


def of_checkpoint(source: str | Path, revision: str | None = None) -> dict[str, str]:
    """{name: digest} of a local checkpoint's files; of a hub id the commit, where it is known here,
    and else its name and revision."""
    if Path(source).is_dir():
        return fingerprint.digests(checkpoint_files(source))
    return {"hub": commit(str(source), revision) or f"{source} {revision}"}


def of_files(files: Mapping[str, Path]) -> str | dict[str, str]:
    """{name: digest} of a folder's files, as the functions above name them; of a file the digest
    alone."""
    found = fingerprint.digests(files)
    return found[""] if list(found) == [""] else found


def _weights(folder: Path, names: list[str]) -> list[str]:
    """The files that the index names, and the single one; all of them where there is neither."""
    every = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    every = [name for name in every if name != ADAPTER[1]]
    used = {SINGLE} if SINGLE in every else set()
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        used |= set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # there is none, or it is damaged, which loading tells
    return [name for name in every if name in used] or every


def commit(source: str, revision: str | None) -> str | None:
    """The commit of the snapshot in the hub's cache; None where there is none, or for no hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def on_the_hub(source: str, revision: str | None) -> dict[str, str]:
    """{"hub": commit} of a hub id, whose configuration is fetched where it is not here; {} for a
    local folder or file, whose contents tell what it is, and where the hub cannot be reached."""
    if source == "sandbox" or source.startswith("pypi:") or Path(source).exists():
        return {}
    found = commit(source, revision)
    if found is None:
        from huggingface_hub import hf_hub_download

        with suppress(Exception):  # loading tells what is wrong
            hf_hub_download(source, "config.json", revision=revision)
            found = commit(source, revision)
    return {} if found is None else {"hub": found}


def _like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
