"""The patch file of a finished run: what notebooks 00 to 03 left, with all that the manifest tells.

`spkit make params/x.yaml patch.safetensors` makes the file again that notebook 03 made, also
revertible or in 8 bits, without deriving or evaluating anything anew. This is the one module of the
package that loads torch.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from spkit.config import BackboneConfig, Config, DerivationConfig
from spkit.method import importance
from spkit.method.patch import Factors
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.method.safepatching import SafePatching
from spkit.method.sets import BitSets
from spkit.models.checkpoint_files import local_folder
from spkit.models.templates import template_text
from spkit.patchfile.make import About, make_patch
from spkit.patchfile.manifest import LONGEST_TEXT, Manifest, Values
from spkit.running.aligned import after_alignment
from spkit.running.runs import backbone_source, input_path, require_made, stage_folder

STAGE = "03_controllable_patching"
TRAINED = {"se": "ascent", "osm": "descent"}  # the section of derivation that only one patch has
ROWS = "model seed split group category metric n k rate low high".split()


def load_safepatching(patches: Path, importances: Path, config: Config) -> SafePatching:
    """What notebooks 01 and 02 left in their folders: two patches, and scores or top-rate sets.

    SpkitError where a file is missing, or the sets were made with other top rates.
    """
    *derived, first, second = files_of_patches(patches, importances, config)
    se, osm = map(Factors.load, derived)
    read = importance.load if config.importance.save == "scores" else BitSets.load
    return SafePatching(se, osm, (read(first), read(second)), config.patching, config.seed)


def files_of_patches(patches: Path, importances: Path, config: Config) -> list[Path]:
    """The files that load_safepatching reads in these two folders."""
    ranked = "importance" if config.importance.save == "scores" else "top"
    names = ("se", "osm")
    files = [patches / f"{name}.safetensors" for name in names]
    return files + [importances / f"{ranked}_{name}.safetensors" for name in names]


def about_run(config: Config, method: SafePatching, results: pd.DataFrame, **more: Any) -> About:
    """What the manifest says of a run: parameters, strengths, seeds, D_h's fingerprint, results.

    results: the frame of evaluation.rates; of it the base and SafePatching are told, without
    categories. more: more of the method's parameters, such as a stage's number.
    """
    alpha, beta = method.strengths()
    shown = results[results["model"].isin(["base", SAFEPATCHING]) & (results["category"] == "all")]
    rows = shown[ROWS].astype(object).where(shown[ROWS].notna(), None)
    se = method.se.manifest
    return About(
        backbone=config.backbone.public_name,
        revision=config.backbone.revision,
        method={
            "name": SAFEPATCHING,
            "seed": method.seed,
            "alpha": float(alpha),
            "beta": float(beta),
            "patching": config.patching.model_dump(mode="json"),
            "derivation": _derivation(config.derivation, method),
            "importance": config.importance.model_dump(mode="json", exclude={"accelerate"}),
            **_chat(config.backbone),
            **more,
        },
        data={"fingerprint": se.get("data_fingerprint"), "pairs": se.get("pairs")},
        evaluation=[_plain(row) for row in rows.to_dict("records")],
    )


def make_from_run(
    config: Config,
    path: str | Path,
    *,
    values: Values = "exact",
    revertible: bool = False,
    progress: bool = True,
) -> Manifest:
    """The patch of a run whose notebook 03 is complete; SpkitError names the one to run first."""
    record = require_made(config, STAGE)
    run = SimpleNamespace(input=partial(input_path, config, STAGE))
    config = after_alignment(config, make=False)
    alpha, beta = record["notes"]["strengths"]
    method = load_safepatching(
        run.input("01_patch_derivation", "."), run.input("02_importance_analysis", "."), config
    )
    # as they were found there: not to be balanced or matched again
    method = method.changed(balance=None, scale="plain", rescale=False, alpha=alpha, beta=beta)
    frames = [
        pd.read_csv(stage_folder(config, stage) / "results.csv", keep_default_na=False)
        for stage in ("00_backbone", STAGE)
    ]
    source = local_folder(backbone_source(config, run), config.backbone.revision)
    return make_patch(
        source,
        method.deltas(),
        path,
        about_run(config, method, pd.concat(frames, ignore_index=True)),
        values=values,
        revertible=revertible,
        progress=progress,
    )


def _derivation(config: DerivationConfig, method: SafePatching) -> dict[str, Any]:
    """Its values. One that is younger than the format is told where it is not at its default: the
    same settings give the same file, and so the same id, in every version of the kit. Of a PEFT
    adapter its name and hash are told, no path, and no settings of the training that it spares. Nor
    is the Accelerate file: it is a path of this machine, and changes the last bits alone."""
    values = config.model_dump(mode="json", exclude={"se", "osm", "accelerate"})
    if values["shared_init"] or config.se or config.osm:  # an adapter has its own start
        del values["shared_init"]
    given = {
        name: patch.manifest["adapter"]
        for name, patch in {"se": method.se, "osm": method.osm}.items()
        if "adapter" in patch.manifest
    }
    if len(given) == len(TRAINED):
        return given
    unused = [TRAINED[name] for name in given]
    return {key: value for key, value in values.items() if key not in unused} | given


def _chat(backbone: BackboneConfig) -> dict[str, Any]:
    """What the answers were asked with besides the checkpoint's own template: whoever applies the
    patch to the backbone has that alone. A template is told by its hash, for it may be private, and
    so are arguments that are too long for a patch file; others as JSON, whatever is in them."""
    told = {}
    if backbone.chat_template_arguments:
        dumped = backbone.model_dump(mode="json")["chat_template_arguments"]
        text = json.dumps(dumped, sort_keys=True)
        told["chat_template_arguments"] = text if len(text) <= LONGEST_TEXT else _sha256(text)
    if backbone.chat_template is not None:
        told["chat_template_sha256"] = _sha256(template_text(backbone.chat_template))
    return told


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
