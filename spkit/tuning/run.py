"""`spkit tune`: derive once, try many settings by the fast objective, judge the best, choose one.

    <outputs>/<run_name>/seed-<seed>/tuning/
        trials.csv, judged.csv    every trial; the points that were answered and judged
        pareto.png, pareto.svg    both as a picture
        chosen.yaml               a params file with the chosen setting
        record.json               what it was made from; written last

What else is there lets an interrupted run resume. It holds the OSM patch, which alone is a
jailbreak, and must stay as private as the run folder.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from spkit.alignment import made as alignment
from spkit.comparison.methods import METHODS
from spkit.comparison.methods.bundle import calibrate
from spkit.config import Config, load_params
from spkit.data.inputs import input_files, of_pairs
from spkit.data.selection import load_eval_prompts, load_harmful_pairs
from spkit.errors import SpkitError
from spkit.evaluation.answers import respond
from spkit.evaluation.judges import check_judges, judged
from spkit.evaluation.labels import BALANCED
from spkit.evaluation.stored import of_backbone, of_setting
from spkit.evaluation.utility.first_token import kl_prompts
from spkit.evaluation.verdicts import FAILED
from spkit.examples import EvalPrompt
from spkit.figures import save
from spkit.method.balancing import balanced, first_token_losses
from spkit.method.patch import whole_patches
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.models.counted import on_the_hub
from spkit.models.loading import load
from spkit.models.patched import patched
from spkit.models.rounded import before_rounding
from spkit.paths import at_root
from spkit.running import checks
from spkit.running.aligned import after_alignment, align
from spkit.running.notebook import without_loading_bars
from spkit.running.runs import identity, read_record, run_folder
from spkit.sandbox.backbone import prepare_backbone
from spkit.system.determinism import make_deterministic
from spkit.system.files import atomic, make_folder, save_csv
from spkit.system.lock import locked
from spkit.system.machine import git_state, hardware, peak_memory_mib, versions
from spkit.system.made_from import code
from spkit.tuning.candidates import Candidates
from spkit.tuning.choose import choose, cost, shortlist
from spkit.tuning.figure import pareto
from spkit.tuning.ingredients import ingredients, stops
from spkit.tuning.objective import REFUSED, Objective, asked_of
from spkit.tuning.search import search
from spkit.tuning.settings import IN_CONTINUAL, Space, with_setting
from spkit.validation import nearest

BASE, AS_SET = "base", "as set"
# patch and strength of the references: at full strength SE may babble, which is neither a refusal
# nor help; base comes first, then OSM, so that help is not read off SE
ALONE = {"OSM x 0.5": ("osm", 0.5), "SE x 0.25": ("se", 0.25)}
LATER = ("trials", "judged", "max_kl")  # of tuning: other values of these keep the trials


@dataclass(frozen=True)
class Point:
    """What is answered and judged: its name in tables, its setting, and its deltas."""

    name: str
    setting: Mapping
    deltas: Mapping
    trial: int = -1


def tune(params: str | Path, given: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Find the settings of `tuning.method` for a params file; the judged points, one chosen.

    given: overrides. The working folder becomes the repository's root. A finished one is not run
    again, an interrupted one resumes. SpkitError for a wrong parameter, before anything is loaded.
    """
    config = load_params(at_root(params), given)
    check(config)
    checks.require(config)
    prompts = dev_prompts(config)
    asked_of(prompts, instructions(config, prompts))  # before patches are derived
    folder = run_folder(config) / "tuning"
    with locked(folder):
        align(config)
        table = _tuned(config, make_folder(folder))
    print(f"\n{summary(table)}\n\n{correlation_sentence(table)}\n\nAll files: {folder}")
    return table


def dev_prompts(config: Config) -> list[EvalPrompt]:
    """Those on which settings are compared."""
    split = {"split": "dev", "prompts_per_cell": config.tuning.prompts_per_cell}
    return load_eval_prompts(config.data, config.evaluation.model_copy(update=split))


def _tuned(config: Config, folder: Path) -> pd.DataFrame:
    """The judged points: read where the search is finished, else it is run."""
    made_from = made_of(config)
    table = _finished(folder, made_from)
    if table is None:
        make_deterministic(config.seed, config.threads)
        without_loading_bars()
        (folder / "record.json").unlink(missing_ok=True)
        table = Tuning(config, folder, made_from).run()
    else:
        print(f"Done already with these parameters: {folder}")
    return table


def check(config: Config) -> None:
    """SpkitError where `tuning` or `judges` asks for what cannot be."""
    method = config.tuning.method
    if method not in METHODS:
        raise SpkitError(
            f"tuning.method is {method!r}, no method of the comparison"
            f"{nearest(method, list(METHODS))}"
        )
    stops(config)
    check_judges(config)


# ---- what it is made from ------------------------------------------------------------------------


def made_of(config: Config) -> dict[str, Any]:
    """All that decides the result: parameters, seed, contents of input files, code."""
    whole = identity(config, "03_controllable_patching")
    dumped = config.model_dump(mode="json")
    return {
        "seed": config.seed,
        "params": whole["params"] | {key: dumped[key] for key in ("tuning", "continual")},
        "files": whole["files"],
        "code": code(["spkit.tuning.run"]),
        **on_the_hub(config.backbone.source, config.backbone.revision),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _of_patches(config: Config, made_from: Mapping) -> str:
    """Names the derivation and the scores; where the ascent stops is in the names of its files."""
    sections = ("backbone", "sandbox", "align", "derivation", "importance")
    params = json.loads(json.dumps({key: made_from["params"][key] for key in sections}))
    params["derivation"]["ascent"].pop("stop_mean_loss")
    params["data"] = of_pairs(config.data)
    aligned = alignment.identity(config) if alignment.needed(config) else None
    roots = code(["spkit.comparison.methods.bundle", "spkit.sandbox.backbone"])
    files = input_files(config, sections)
    parts = [made_from["seed"], params, files, roots, aligned]
    return _digest(parts + [made_from["hub"]] if "hub" in made_from else parts)


def _of_trials(made_from: Mapping) -> str:
    """Names all that decides a trial; more trials, or a stricter choice, keep those there are."""
    params = json.loads(json.dumps(made_from["params"]))
    for key in LATER:
        params["tuning"].pop(key)
    return _digest({**made_from, "params": params})


def _finished(folder: Path, made_from: Mapping) -> pd.DataFrame | None:
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        if {key: record[key] for key in made_from} != json.loads(json.dumps(made_from)):
            return None
        return pd.read_csv(folder / "judged.csv", keep_default_na=False, na_values=["nan"])
    except (OSError, ValueError, KeyError):
        return None


def _fresh(folder: Path, kind: str, digest: str) -> Path:
    """<kind>-<digest>; what others left is deleted, for no second copy of a patch is kept."""
    own = folder / f"{kind}-{digest}"
    for old in folder.glob(f"{kind}-*"):
        if old != own:
            shutil.rmtree(old)
    return make_folder(own)


# ---- the work ------------------------------------------------------------------------------------


class Tuning:
    """One run, step after step."""

    def __init__(self, config: Config, folder: Path, made_from: dict):
        self.asked_for, self.config = config, after_alignment(config, make=False)
        self.folder, self.made_from = folder, made_from
        self.began = time.monotonic()
        self.evaluation = config.evaluation
        self.prompts = dev_prompts(self.config)
        self.trials_of = _of_trials(made_from)
        self.work = _fresh(folder, "work", self.trials_of)
        self.seconds: dict[str, float] = {}
        self.stores: set[Path] = set()  # of answers, that this run has used

    def run(self) -> pd.DataFrame:
        """All steps; the judged points."""
        self.prepare()
        trials = self.search()
        table, chosen, why = self.judge(trials)
        print(why)
        self.write(trials, table, chosen, why)
        return table

    def prepare(self) -> None:
        """Backbone, patches, and the stored answers from which the refusing tokens are learnt."""
        config = self.config
        source = _backbone(config, self.folder)
        self.source = source
        self.patches = _fresh(self.folder, "patches", _of_patches(self.asked_for, self.made_from))
        bundles = ingredients(config, source, self.patches)
        self.stops = list(bundles)
        self.own = self._own_stop()
        self.model, self.tokenizer = load(source, **config.answering)
        pairs = load_harmful_pairs(config.data, seed=config.seed)
        calibration = calibrate(pairs, config, config.seed)
        self.losses = first_token_losses(self.model, self.tokenizer, calibration)
        made = [_with_losses(bundle, self.losses) for bundle in bundles.values()]
        self.candidates = Candidates(config.tuning.method, made, config.patching, config.seed)
        self._learn(made[self.own])

    def _own_stop(self) -> int:
        """The number of the bundle at which the config's own ascent stops."""
        wanted = self.config.derivation.ascent.stop_mean_loss
        return max(i for i, stop in enumerate(self.stops) if stop <= wanted)

    def _learn(self, bundle) -> None:
        """Answers of base and of weak patches, judged; and what the fast objective sees."""
        config = self.config
        self.known = [Point(BASE, {}, {})] + [
            Point(name, {}, whole_patches((bundle.patch(patch), strength)))
            for name, (patch, strength) in ALONE.items()
        ]
        texts = instructions(config, self.prompts)
        size = self.evaluation.batch_size
        self.objective = Objective(self.model, self.tokenizer, self.prompts, texts, size)
        started = time.monotonic()
        self.answers = self._answers(self.known)
        self.seconds["answers of a point"] = (time.monotonic() - started) / len(self.known)
        found = judged(self.answers, self.prompts, config)
        ids = [prompt.id for prompt in self.objective.asked]
        refuses = found["verdict"].isin(REFUSED)
        self.objective.openings(found.assign(refused=refuses)[["id", "response", "refused"]])
        looks, refused = [], []
        for point in self.known:
            rows = found[found["model"] == point.name].set_index("id")
            refused.append(torch.tensor(rows.loc[ids, "verdict"].isin(REFUSED).to_numpy()))
            looks.append(self.objective.look(self._given(point.deltas)))
        self.objective.learn([look for look, _ in looks], refused, looks[0][1])
        self.fast = {
            point.name: self.objective.of(*look)
            for point, look in zip(self.known, looks, strict=True)
        }

    def _given(self, deltas: Mapping) -> Mapping:
        """The deltas as the answering model gets them, which may be in a lower precision."""
        return before_rounding(deltas, self.source, self.model)

    def _answers(self, points: Iterable[Point]) -> pd.DataFrame:
        """What the points answer on dev, stored as it comes."""
        frames = []
        for point in points:
            context = self._context(point)
            options = self.evaluation.model_dump(include={"max_new_tokens", "batch_size"})
            store = make_folder(self.folder / "answers") / f"{_digest([point.name, context])}.jsonl"
            self.stores.add(store)
            options |= {"store": store, "name": point.name, "context": context}
            with patched(self.model, self._given(point.deltas)):
                frames.append(respond(self.model, self.tokenizer, self.prompts, **options))
        return pd.concat(frames, ignore_index=True)

    def _context(self, point: Point) -> str:
        """What a point's answers depend on: neither the judges nor which trial it was."""
        config = self.config
        if point.name == BASE:
            return of_backbone(config, self.source)
        sections = {"patching", "importance"}
        about = config.model_dump(mode="json", include=sections) | {"seed": config.seed}
        about |= {"method": config.tuning.method, "setting": dict(point.setting)}
        about |= {"stops": self.stops}
        files = sorted(self.patches.rglob("*.safetensors"))
        return of_setting(config, self.source, about, files, ["spkit.tuning.candidates"])

    def search(self) -> pd.DataFrame:
        """The trials by the fast objective."""
        config, tuning = self.config, self.config.tuning
        self.space = Space(tuning.method, tuning.scales, len(self.stops))
        self.by_hand = self._by_hand()
        first = self._as_trial()
        started = time.monotonic()

        def told(left: int) -> None:
            each = time.monotonic() - started
            answering = self.seconds["answers of a point"] * (tuning.judged + 1)
            self.seconds["first trial"] = each
            print(
                f"{left} trials at {each:.1f} s: about {_minutes(left * each)}; then the answers "
                f"of {tuning.judged + 1} settings: about {_minutes(answering)} and the judges' time"
            )

        done = search(
            self.space,
            self.measure,
            self.work / "trials.jsonl",
            {"made from": self.trials_of},
            trials=tuning.trials,
            seed=config.seed,
            first=first,
            told=told,
        )
        self.seconds["trials"] = time.monotonic() - started
        return done

    def measure(self, setting: Mapping) -> dict[str, float]:
        """One trial: a setting of the method, by the fast objective (objective.py)."""
        return self.objective.measure(self._given(self.candidates.deltas(setting)))

    def _by_hand(self) -> Point:
        """The setting of `patching`, as notebook 03 makes it: alpha found where balance is set."""
        method = balanced(self.candidates.safepatching({}, self.own), self.losses)
        keys = ("retention_rate", "top_rate_se", "top_rate_osm", "alpha", "beta", "scale")
        setting = {key: getattr(method.config, key) for key in keys} | {"stop": self.own}
        return Point(AS_SET, setting, method.deltas())

    def _as_trial(self) -> dict | None:
        """The same as a setting of the method that is tuned, or None where it is of another."""
        method, balance = self.config.tuning.method, self.config.patching.balance
        if method == SAFEPATCHING:
            return dict(self.by_hand.setting)
        if method == BALANCED and balance is not None:
            own = {k: v for k, v in self.by_hand.setting.items() if k not in ("alpha", "scale")}
            return own | {"target": balance}
        return None

    def judge(self, trials: pd.DataFrame) -> tuple[pd.DataFrame, dict, str]:
        """(the judged points, the chosen setting, why it was chosen)."""
        config, tuning = self.config, self.config.tuning
        first = self._as_trial()
        usable = trials if first is None else trials[trials["trial"] > 0]
        numbers = shortlist(usable, self.fast[BASE], tuning.judged, tuning.max_kl)
        settings = {n: json.loads(trials.loc[n, "setting"]) for n in numbers}
        points = [self.by_hand] + [
            Point(f"trial {n}", s, self.candidates.deltas(s), n) for n, s in settings.items()
        ]
        frames = [self.answers, self._answers(points)]
        for point in points:
            self.fast[point.name] = self.objective.measure(self._given(point.deltas))
        every = [*self.known, *points]
        # the judges may need the memory, and all of these hold the model
        del self.model, self.losses, self.objective, self.candidates
        found = judged(pd.concat(frames, ignore_index=True), self.prompts, config)
        table = self._table(found, every)
        own = table["trial"] >= 0
        if first is not None:
            own |= table["point"] == AS_SET
        place, why = choose(table[own], table.loc[0], tuning.max_kl)
        table["chosen"] = table.index == place
        by_hand = first if table.loc[place, "point"] == AS_SET else None
        return table, by_hand or dict(every[place].setting), why

    def _table(self, found: pd.DataFrame, points: list[Point]) -> pd.DataFrame:
        rows = [
            {
                "point": point.name,
                "trial": point.trial,
                **rates_of(found[found["model"] == point.name]),
                "kl": self.fast[point.name]["kl"],
                **{f"fast_{key}": self.fast[point.name][key] for key in ("harm", "refusal")},
                "setting": json.dumps(dict(point.setting)),
            }
            for point in points
        ]
        costs = [cost(row, rows[0]) for row in rows]
        return pd.DataFrame(rows).assign(cost=costs)

    def write(self, trials: pd.DataFrame, table: pd.DataFrame, chosen: dict, why: str) -> None:
        """All files, the record last."""
        folder, config = self.folder, self.config
        save_csv(folder / "trials.csv", trials)
        save_csv(folder / "judged.csv", table)
        save(folder, "pareto", pareto(trials, table, config.tuning.max_kl))
        with atomic(folder / "chosen.yaml") as path:
            path.write_text(params_text(self.asked_for, chosen, self.stops), encoding="utf-8")
        for store in set((folder / "answers").glob("*.jsonl")) - self.stores:
            store.unlink()  # of other settings
        self.seconds["in all, since the last start"] = time.monotonic() - self.began
        record = {
            **self.made_from,
            "chosen": {"method": config.tuning.method, "setting": chosen, "why": why},
            "stops": self.stops,
            "rank correlation": correlation(table),
            "seconds": {key: round(value, 2) for key, value in self.seconds.items()},
            "run_name": config.run_name,
            "threads": config.threads,
            "versions": versions(),
            "git": git_state(),
            "hardware": hardware(),
            "peak_memory_mib": peak_memory_mib(),
        }
        with atomic(folder / "record.json") as path:
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _with_losses(bundle, losses):
    return replace(bundle, first_token_losses=losses)


def _backbone(config: Config, folder: Path) -> str | Path:
    """The backbone that notebook 00 prepared with these parameters, else one of our own."""
    record = read_record(config, "00_backbone")
    dumped = config.model_dump(mode="json")
    own = run_folder(config) / "00_backbone" / "model"
    keys = ("backbone", "sandbox")
    if own.is_dir() and record is not None:
        theirs = record.get("params", {})
        same = all(theirs.get(key) == dumped[key] for key in keys) and record["seed"] == config.seed
        then = record.get("code", {})
        if same and all(then.get(k, v) == v for k, v in code(["spkit.sandbox.backbone"]).items()):
            return own
    digest = _digest(
        [config.seed, *(dumped[key] for key in keys), code(["spkit.sandbox.backbone"])]
    )
    target = folder / f"backbone-{digest}"
    for old in folder.glob("backbone-*"):
        if old != target:
            shutil.rmtree(old)
    return target if target.is_dir() else prepare_backbone(config, target)


def instructions(config: Config, prompts: list[EvalPrompt]) -> list[str]:
    """The harmless instructions on which the KL is taken: those of utility.kl, else from dev.

    From dev: the prompts of utility, or the over-safety prompts where there are none.
    """
    utility = config.utility
    if utility.kl is not None:
        dev = config.evaluation.model_copy(update={"split": "dev"})
        return kl_prompts(config.model_copy(update={"evaluation": dev}))
    for objective in ("utility", "over_safety"):
        found = [prompt.prompt for prompt in prompts if prompt.objective == objective]
        if found:
            return list(dict.fromkeys(found))
    return []


# ---- what is shown and written -------------------------------------------------------------------


def rates_of(answers: pd.DataFrame) -> dict[str, float]:
    """harm, refusal, failed (on both), utility in percent, and how many prompts: n_harm, n_refusal.

    answers: judged, of one model. utility: NaN where it was not asked.
    """

    def percent(objectives: tuple[str, ...], verdicts: tuple[str, ...]) -> tuple[float, int]:
        part = answers[answers["objective"].isin(objectives)]["verdict"]
        return 100 * float(part.isin(verdicts).mean()), len(part)

    harm, n_harm = percent(("harmful",), ("harmful",))
    refusal, n_refusal = percent(("over_safety",), REFUSED)
    failed, _ = percent(("harmful", "over_safety"), FAILED)
    utility, _ = percent(("utility",), ("correct",))
    return {
        **{"harm": harm, "refusal": refusal, "failed": failed, "utility": utility},
        **{"n_harm": n_harm, "n_refusal": n_refusal},
    }


def correlation(table: pd.DataFrame) -> dict[str, float | None]:
    """Spearman's rank correlation of the fast objective with the judged rates, by objective.

    None where all points have one and the same rate: there is nothing to rank.
    """
    found: dict[str, float | None] = {}
    for key in ("harm", "refusal"):
        pair = table[[key, f"fast_{key}"]]
        constant = (pair.nunique() < 2).any()
        found[key] = None if constant else float(pair.corr(method="spearman").iloc[0, 1])
    return found


def correlation_sentence(table: pd.DataFrame) -> str:
    """The same as a sentence."""
    shown = ["undefined" if x is None else f"{x:.2f}" for x in correlation(table).values()]
    return (
        f"Rank correlation of the fast objective with the judged answers, {len(table)} points: "
        f"harm {shown[0]}, false refusal {shown[1]}"
    )


def summary(table: pd.DataFrame) -> str:
    """base, as set and chosen: harm, refusal, failed, KL on dev."""
    rows = table[table["point"].isin([BASE, AS_SET]) | table["chosen"]]
    shown = rows[["point", "harm", "refusal", "failed", "utility", "kl", "cost"]].copy()
    shown["point"] = [f"{p} (chosen)" if c else p for p, c in rows[["point", "chosen"]].to_numpy()]
    shown = shown.dropna(axis="columns")
    names = {"harm": "harm %", "refusal": "false refusal %", "failed": "failed text %"}
    names |= {"utility": "utility %", "kl": "KL", "point": "on dev"}
    return shown.rename(columns=names).to_string(index=False, float_format=lambda x: f"{x:.3g}")


def params_text(config: Config, chosen: Mapping, stops: list[float]) -> str:
    """A complete params file with the chosen setting."""
    method = config.tuning.method
    made = with_setting(config, method, chosen, stops)
    head = [f"# Written by spkit tune: {method}, {json.dumps(dict(chosen))}"]
    if method not in (SAFEPATCHING, BALANCED, *IN_CONTINUAL):
        head.append(f"# A params file has no place for the settings of {method}.")
    dumped = made.model_dump(mode="json")
    return "\n".join([*head, yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True)])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
