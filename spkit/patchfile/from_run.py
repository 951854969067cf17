"""The patch file of a finished run: what notebooks 00 to 03 left, with all that the manifest tells.

`spkit make params/x.yaml patch.safetensors` makes the file again that notebook 03 made, also
revertible or in 8 bits, without deriving or evaluating anything anew. This is the one module of the
package that loads torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from spkit.ablations import SAFEPATCHING, Variants, load_variants
from spkit.checkpoint_files import local_folder
from spkit.config import Config
from spkit.data import backbone_source, public_name
from spkit.errors import SpkitError
from spkit.patchfile.make import About, make_patch
from spkit.patchfile.manifest import Manifest, Values
from spkit.runs import input_path, read_record, require, stage_folder

STAGE = "03_controllable_patching"
ROWS = "model seed split group category metric n k rate low high".split()


def about_run(config: Config, variants: Variants, results: pd.DataFrame, **method: Any) -> About:
    """What the manifest says of a run: parameters, strengths, seeds, D_h's fingerprint, results.

    results: the frame of evaluation.rates; of it the base and SafePatching are told, without
    categories. method: more of the method's parameters, such as a stage's number.
    """
    alpha, beta = variants.strengths(SAFEPATCHING)
    shown = results[results["model"].isin(["base", SAFEPATCHING]) & (results["category"] == "all")]
    rows = shown[ROWS].astype(object).where(shown[ROWS].notna(), None)
    se = variants.se.manifest
    return About(
        backbone=public_name(config),
        revision=config.backbone.revision,
        method={
            "name": SAFEPATCHING,
            "seed": variants.seed,
            "alpha": float(alpha),
            "beta": float(beta),
            "patching": config.patching.model_dump(mode="json"),
            "derivation": config.derivation.model_dump(mode="json"),
            "importance": config.importance.model_dump(mode="json"),
            **method,
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
    require(config, STAGE)
    run = SimpleNamespace(input=partial(input_path, config, STAGE))
    record = read_record(config, STAGE)
    if record is None:
        missing, notebook = stage_folder(config, STAGE) / "record.json", f"notebooks/{STAGE}.ipynb"
        which = f"run_name={config.run_name}, seed={config.seed}"
        raise SpkitError(f"{missing} is missing: run {notebook} first ({which})")
    alpha, beta = record["notes"]["strengths"]
    variants = load_variants(
        run.input("01_patch_derivation", "."), run.input("02_importance_analysis", "."), config
    )
    # as they were found there: not to be balanced or matched again
    fixed = {"balance": None, "scale": "plain", "rescale": False, "alpha": alpha, "beta": beta}
    variants = replace(variants, config=variants.config.model_copy(update=fixed))
    frames = [
        pd.read_csv(stage_folder(config, stage) / "results.csv", keep_default_na=False)
        for stage in ("00_backbone", STAGE)
    ]
    source = local_folder(backbone_source(config, run), config.backbone.revision)
    return make_patch(
        source,
        variants.deltas(SAFEPATCHING),
        path,
        about_run(config, variants, pd.concat(frames, ignore_index=True)),
        values=values,
        revertible=revertible,
        progress=progress,
    )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
