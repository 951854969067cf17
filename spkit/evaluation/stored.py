"""What a stored answer depends on: the weights that say it, how they are loaded, and the code.

    context = of_backbone(config, source)                   of the backbone as it is
    context = of_patches(config, source, method, files)     of patches that are made of `files`
    respond(..., store=path, context=context)                      the same context: read, not said

Prompts and decoding are in a store's own header, and so is the variant's name. Judges, utility and
intervals are nowhere in it: they can be corrected without one token being generated anew. Weights
count by what they hold, so a folder may be moved.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from spkit.config import Config
from spkit.data.inputs import input_files, of_pairs, template_file
from spkit.method.safepatching import SafePatching
from spkit.models import counted
from spkit.system import fingerprint, made_from

ANSWERING = ("spkit.evaluation.answers", "spkit.models.loading")
PATCHING = ("spkit.evaluation.variants", "spkit.comparison.ablations")
CONTINUAL = ("spkit.comparison.continual",)


def of_backbone(config: Config, source: str | Path) -> str:
    """Of the backbone alone. source: the folder or hub id that it is loaded from."""
    return _named(_backbone(config, source), ANSWERING)


def of_patches(
    config: Config,
    source: str | Path,
    method: SafePatching,
    files: Iterable[Path],
    code: Sequence[str] = (),
) -> str:
    """Of the variants of a method, which are told apart by their names.

    method: with the strengths that are used, after any balancing. files: of the patch factors and
    of the importances or sets. code: modules that make the variants, besides the ablations.
    """
    about = {"seed": method.seed, "patching": method.config.model_dump(mode="json")}
    return of_setting(config, source, about, files, (*PATCHING, *code))


def of_setting(
    config: Config,
    source: str | Path,
    setting: Mapping[str, Any],
    files: Iterable[Path],
    code: Sequence[str],
) -> str:
    """Of what the modules `code` make of these files with this setting, which JSON can hold."""
    digests = fingerprint.digests({str(i): file for i, file in enumerate(files)})
    parts = _backbone(config, source) | {"setting": setting, "patches": digests}
    return _named(parts, (*ANSWERING, *code))


def of_stages(config: Config, source: str | Path) -> str:
    """Of continual patching: all that its stages have in common.

    A method's own setting, the categories and the prompts are added there.
    """
    keys = ("derivation", "importance", "patching", "baselines")
    dumped = config.model_dump(mode="json", include=set(keys))
    used = ("backbone", "data", "align", "derivation")
    files = {k: v for k, v in input_files(config, used).items() if k != "backbone.source"}
    parts = _backbone(config, source) | dumped | {"files": files, "seed": config.seed}
    parts["pairs"] = of_pairs(config.data)
    # where the model that is loaded for deriving is another than the one that answers
    parts["derived in"] = config.backbone.compute_dtype
    return _named(parts, (*ANSWERING, *CONTINUAL))


def _backbone(config: Config, source: str | Path) -> dict[str, Any]:
    loading = {k: v for k, v in config.answering.items() if k != "revision"}
    template = template_file(config)
    if template is not None:
        loading["chat_template"] = fingerprint.digest(template)
    weights = counted.of_checkpoint(source, config.backbone.revision)
    return {"weights": weights, "loading": loading}


def _named(parts: Mapping[str, Any], code: Sequence[str]) -> str:
    text = json.dumps({**parts, "code": made_from.code(code)}, sort_keys=True)
    return blake3(text.encode()).hexdigest()
