"""A model card for a patch, or for a checkpoint made with it: results, limits, hazards, licence.

All figures are those of the patch's own evaluation record; nothing is measured here. The YAML head
has the keys that hubs read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spkit.errors import SpkitError
from spkit.patchfile.file import PatchFile
from spkit.patchfile.manifest import Manifest
from spkit.system.files import atomic
from spkit.validation import flattened

PAPER = "https://arxiv.org/abs/2405.13820"
# balancing finds other strengths than the parameters give
USED = {"alpha": "alpha, as used", "beta": "beta, as used"}
COLUMNS = "model seed split group metric n k rate low high".split()
SAMPLE = "patch.safetensors"

LIMITS = """\
* The rates above are those of one run{seed}: other data, another judge or another seed can give
  others. Intervals are over prompts only.
* "harmful" and "refused" are verdicts of an automatic judge. Broken text counts as neither; the
  strict rows count it as a failure.
* What was not evaluated (other languages, long dialogues, other attacks) may have become worse.
"""

HAZARDS = """\
* A patch is the sum of a part that makes a model refuse more and a part that makes it refuse less.
  This file holds merged values only, never the second part by itself, and no factors.
* Merged is not secret: whoever has the patch reads every merged value, can redraw the random masks
  with the seed, and may be able to restore the loosening part (by matrix completion, where many of
  its entries can be told apart). Publish a patch as if that part went with it.
* A patch reduces harmful answers and does not end them. Test before use.
"""

LICENCE = """\
The patch changes a backbone whose licence goes on to apply: to the patched checkpoint as a
derivative, and possibly to this patch, whose values were derived from it. Read that licence, and
keep its notices (LICENSE, USE_POLICY and the like) with the checkpoint. The harmful pairs
themselves are not in this file, only their fingerprint; their licence may also restrict use.
"""


def card(patch: str | Path, path: str | Path, *, overwrite: bool = False, **about: Any) -> Path:
    """Write the card of a patch to `path`, a file or a folder (then README.md in it).

    about: base_model and license, for the YAML head (default: the backbone's name; none).
    SpkitError where the file exists and `overwrite` is not set: a folder that was made by `apply`
    holds the *backbone's* card, which then is wrong, but not ours to replace unasked.
    """
    path = Path(path)
    path = path / "README.md" if path.is_dir() else path
    if path.exists() and not overwrite:
        what = "it may be the backbone's own card" if path.name == "README.md" else "not replaced"
        raise SpkitError(f"{path} exists already ({what}): choose another name, or --overwrite it.")
    with PatchFile(patch) as opened:
        text = card_text(opened.manifest, opened.id, Path(patch).name, **about)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def card_text(
    manifest: Manifest,
    patch: str,
    name: str = SAMPLE,
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The card as markdown with a YAML head."""
    head = {
        "base_model": base_model or manifest.backbone.name,
        "library_name": "transformers",
        **({} if license is None else {"license": license}),
        "tags": ["safety-patch", "safepatching", "post-safety-alignment"],
    }
    backbone, seed = manifest.backbone, manifest.method.get("seed")
    at = f" at revision `{_cell(backbone.revision)}`" if backbone.revision else ""
    method, data = flattened(manifest.method), flattened(manifest.data)
    kept = f"{manifest.kept:,} of {manifest.weights:,} weights"
    name = _cell(name)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# A safety patch for {_cell(backbone.name)}",
        f"It changes {kept} ({100 * manifest.kept / manifest.weights:.2f} %) in "
        f"{len(manifest.tensors)} matrices of {_cell(backbone.name)}{at} "
        f"({_cell(backbone.architecture)}), by SafePatching ([arXiv 2405.13820]({PAPER})): "
        f"{_origin(manifest)}, thinned, and merged where they do not interfere."
        f"\n\nPatch id: `{patch}`",
        "## Use",
        f"```\nspkit verify {name} --backbone BACKBONE\nspkit apply {name} BACKBONE PATCHED\n```\n"
        'The folder `PATCHED` loads with `AutoModelForCausalLM.from_pretrained("PATCHED")`. '
        + _taking_back(manifest, name),
        "## Results",
        _results(manifest),
        "## How it was made",
        _table([{"parameter": USED.get(k, k), "value": v} for k, v in method.items()]),
        _table([{"harmful pairs": k, "": v} for k, v in data.items()]),
        _table([{"library": k, "version": v} for k, v in manifest.versions.items()]),
        "## Limits",
        LIMITS.format(seed="" if seed is None else f" (seed {_cell(seed)})") + _error(manifest),
        f"## Hazards\n\n{HAZARDS}",
        f"## Licence\n\n{LICENCE}",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _origin(manifest: Manifest) -> str:
    """What the two patches were made of: D_h, or an adapter that was brought."""
    derivation = manifest.method.get("derivation")
    derivation = derivation if isinstance(derivation, dict) else {}
    brought = [name for name in ("se", "osm") if isinstance(derivation.get(name), dict)]
    names = " and ".join(
        f"{name.upper()} is the LoRA adapter {_cell(derivation[name].get('name'))}"
        for name in brought
    )
    if len(brought) == 2:
        return f"two patches that were not derived here ({names})"
    source = "one set of harmful question/answer pairs"
    if brought:
        return f"two patches, one derived from {source} and one not ({names})"
    return f"two patches from {source}"


def _taking_back(manifest: Manifest, name: str) -> str:
    if manifest.revertible:
        return f"`spkit revert {name} PATCHED ORIGINAL` restores the backbone's exact bytes."
    return f"`spkit revert {name} PATCHED ORIGINAL --backbone BACKBONE` takes it back."


def _results(manifest: Manifest) -> str:
    rows = [row for row in manifest.evaluation if row.get("category", "all") == "all"]
    if not rows:
        return "The patch carries no evaluation record."
    percent = ("rate", "low", "high")
    shown = [
        {
            key: f"{100 * row[key]:.1f} %" if key in percent and _number(row[key]) else row[key]
            for key in COLUMNS
            if key in row
        }
        for row in rows
    ]
    return _table(shown) + "\n\nRates with 95 % intervals over prompts, k of n."


def _error(manifest: Manifest) -> str:
    error, lost = manifest.error, f"{manifest.lost:,} kept deltas change nothing"
    text = f"* {lost} in the backbone's dtype: its rounding swallows them.\n"
    if manifest.values == "exact":
        return text + "* Applied, the weights are exactly those of composition in float32.\n"
    return text + (
        f"* Values are stored as {manifest.values}: relative error {error.relative_rms:.2%} (rms), "
        f"and {error.changed:,} weights differ from composition in float32.\n"
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(rows: list[Mapping[str, Any]]) -> str:
    """A table of markdown; a row that lacks a key has an empty cell there."""
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = [_cell(key) for key in keys]
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    widths = [len(title) + 2 for title in head]
    for row in cells:
        widths = [max(width, len(text)) for width, text in zip(widths, row, strict=True)]
    lines = ["|" + "|".join(f":{'-' * (width + 1)}" for width in widths) + "|"]
    for row in (head, *cells):
        padded = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    lines[0], lines[1] = lines[1], lines[0]  # the rule comes after the head
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """Text from a file that nobody vouches for: no markup of markdown or HTML survives in it."""
    text = "" if value is None else str(value)
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", text.replace("\n", " "))
