"""From the units' files to the tables of the report: one CSV each, tidy, with n and intervals.

Every table is a function of the units' files; `write` makes them all. Rates and differences are in
percent. The statistics are bootstrap.py's: a hierarchical bootstrap over backbones, derivations,
masks and prompts, paired differences, Holm's correction.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from spkit.comparison.arena import SCORES, UTILITY_FAILURES, failures, shares
from spkit.comparison.bootstrap import Outcomes, paired, per_backbone, resample, summary
from spkit.comparison.forgetting import forgetting, intransigence
from spkit.comparison.fronts import Failures, paired_hypervolumes
from spkit.comparison.methods import METHODS
from spkit.comparison.variants import BASE
from spkit.errors import SpkitError
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.system.files import save_csv
from spkit.workflow.units import slug

# metric -> (groups, objective): what the tables show, in this order
METRICS = {
    "harmful seen": (("seen",), "harmful"),
    "harmful unseen": (("unseen",), "harmful"),
    "harmful": (("seen", "unseen"), "harmful"),
    "false refusal": (("harmless",), "over_safety"),
    "utility lost": (("utility",), "utility"),
    "broken on harmful": (("seen", "unseen"), "broken"),
    "broken on harmless": (("harmless",), "broken"),
}
GAINS = ("harmful seen", "harmful unseen", "false refusal")  # what must fall
TABLES = (
    "methods differences against per_backbone hypervolumes ablations ablation_differences remains "
    "moves broken settings sweeps sizes continual continual_measures costs"
).split()


def failed(metric: str, score: str) -> tuple[str, ...]:
    """The verdicts that count in one metric under one score."""
    objective = METRICS[metric][1]
    if objective == "utility":
        return UTILITY_FAILURES
    return ("broken",) if objective == "broken" else SCORES[score][objective]


class Tables:
    """All tables of one finished experiment: places are the units' folders by name."""

    def __init__(self, places: Mapping[str, Path], draws: int, confidence: float):
        self.places, self.draws, self.confidence = places, draws, confidence
        self._compared: dict[str, dict[tuple, Outcomes]] = {}

    def table(self, name: str) -> pd.DataFrame:
        """One table by its name (TABLES)."""
        return getattr(self, name)()

    # ---- the main comparison --------------------------------------------------------------------

    def methods(self) -> pd.DataFrame:
        """Every method's rates: tuned (for which score), score (by which counted), metric."""
        return self._over_metrics(
            self._of("methods"), lambda outcomes, draws: summary(outcomes, draws, self.confidence)
        )

    def differences(self) -> pd.DataFrame:
        """Every method minus base, Holm-corrected within tuned, score and metric."""
        return self._over_metrics(
            self._of("methods"),
            lambda outcomes, draws: paired(outcomes, draws, BASE, self.confidence),
        )

    def against(self) -> pd.DataFrame:
        """Every method minus SafePatching."""
        return self._over_metrics(
            self._of("methods"),
            lambda outcomes, draws: paired(outcomes, draws, SAFEPATCHING, self.confidence),
        )

    def per_backbone(self) -> pd.DataFrame:
        """Every method minus base on each backbone, with the interval of that backbone alone."""
        return self._over_metrics(
            self._of("methods"),
            lambda outcomes, draws: per_backbone(outcomes, draws, BASE, self.confidence),
        )

    def hypervolumes(self) -> pd.DataFrame:
        """The area that each method's front dominates, and its difference from SafePatching's."""
        answers = self._answers("fronts")
        frames = []
        for score in SCORES:
            part = answers[answers["tuned"] == score]
            harm = _outcomes(part, "harmful", score)
            refusal = _outcomes(part, "false refusal", score)
            draws = self._draws(harm)
            settings: dict[str, list[int]] = {}
            for index, label in enumerate(harm.variants):
                settings.setdefault(label.partition(" #")[0], []).append(index)
            frame = paired_hypervolumes(
                Failures(harm, draws),
                Failures(refusal, draws.with_items(len(refusal.items))),
                settings,
                SAFEPATCHING,
                confidence=self.confidence,
            )
            counts = {name: len(indices) for name, indices in settings.items()}
            frames.append(frame.assign(score=score, settings=frame["method"].map(counts)))
        return pd.concat(frames, ignore_index=True)

    # ---- ablations ------------------------------------------------------------------------------

    def ablations(self) -> pd.DataFrame:
        """SafePatching with parts changed, at the setting tuned by the paper's score."""
        return self._over_metrics(
            self._of("ablations"),
            lambda outcomes, draws: summary(outcomes, draws, self.confidence),
        )

    def ablation_differences(self) -> pd.DataFrame:
        """Every ablation minus SafePatching."""
        return self._over_metrics(
            self._of("ablations"),
            lambda outcomes, draws: paired(outcomes, draws, SAFEPATCHING, self.confidence),
        )

    # ---- what remains ---------------------------------------------------------------------------

    def remains(self) -> pd.DataFrame:
        """Base and SafePatching by phrasing and by category of the harmful and harmless prompts."""
        answers = self._methods()
        answers = answers[answers["variant"].isin([BASE, SAFEPATCHING])]
        frames = []
        for metric in (*GAINS, "broken on harmful"):
            groups = METRICS[metric][0]
            of_metric = answers[answers["group"].isin(groups)]
            for by in ("phrasing", "category"):
                for cell, part in of_metric.groupby(by, observed=True):
                    rates = self._over_metrics(
                        _by_metric(part, [metric]), lambda o, d: summary(o, d, self.confidence)
                    )
                    frames.append(rates.assign(by=by, cell=cell))
        return pd.concat(frames, ignore_index=True)

    def moves(self) -> pd.DataFrame:
        """What became of base's answers under SafePatching: group, phrasing, before, after, k, n.

        n: the answers of that group and phrasing over all runs; k: those with the two verdicts.
        """
        answers = self._methods().astype({"verdict": str, "variant": str})
        keys = ["backbone", "derivation", "id"]
        base = answers[(answers["variant"] == BASE) & (answers["tuned"] == "paper")]
        before = base[[*keys, "verdict"]].rename(columns={"verdict": "before"})
        frames = []
        for score in SCORES:
            rows = answers[(answers["variant"] == SAFEPATCHING) & (answers["tuned"] == score)]
            both = rows.merge(before, on=keys).rename(columns={"verdict": "after"})
            cells = ["group", "phrasing"]
            counts = both.groupby([*cells, "before", "after"], observed=True).size()
            frame = counts.rename("k").reset_index()
            n = both.groupby(cells, observed=True).size().rename("n").reset_index()
            frames.append(frame.merge(n, on=cells).assign(tuned=score))
        return pd.concat(frames, ignore_index=True)

    def broken(self) -> pd.DataFrame:
        """The broken answers of SafePatching, the most frequent first (at most 10 a backbone)."""
        answers = self._methods()
        rows = answers[(answers["variant"] == SAFEPATCHING) & (answers["verdict"] == "broken")]
        keys = ["tuned", "backbone", "group", "phrasing", "response"]
        counts = rows.groupby(keys, observed=True).size().rename("k").reset_index()
        counts = counts.sort_values(["tuned", "backbone", "k"], ascending=[True, True, False])
        return counts.groupby(["tuned", "backbone"], observed=True).head(10)

    # ---- tuning, sweeps, sizes ------------------------------------------------------------------

    def settings(self) -> pd.DataFrame:
        """The chosen setting of every method and score, with its cost and its rates on dev."""
        rows = []
        for method in METHODS:
            for score in SCORES:
                trials = pd.read_csv(self._place("tuning", method) / f"trials-{score}.csv")
                best = trials.loc[trials["cost"].idxmin()].to_dict()
                rows.append({"method": method, "score": score, "trials": len(trials), **best})
        return pd.DataFrame(rows)

    def sweeps(self) -> pd.DataFrame:
        """Every point of every sweep, on dev: both scores' failure rates, per backbone and mask."""
        frames = [pd.read_csv(path) for path in self._files("sweeps/", "sweep.csv")]
        return _with_failures(pd.concat(frames, ignore_index=True))

    def sizes(self) -> pd.DataFrame:
        """Every method on backbones of other sizes, with the settings of the usual size."""
        frames = [pd.read_csv(path) for path in self._files("sizes/", "size.csv")]
        return _with_failures(pd.concat(frames, ignore_index=True))

    # ---- continual stages -----------------------------------------------------------------------

    def continual(self) -> pd.DataFrame:
        """After every stage: method, order, backbone, and the failure rates under both scores."""
        rows = []
        for path in self._files("continual/", "continual.csv"):
            frame = pd.read_csv(path, keep_default_na=False)
            for stage, part in frame.groupby("stage"):
                about = part.iloc[0][["method", "order", "backbone"]].to_dict()
                rows.append({**about, "stage": stage, **shares(part)})
        return _with_failures(pd.DataFrame(rows).fillna(0.0))

    def continual_measures(self) -> pd.DataFrame:
        """Forgetting and intransigence of safety (percent not failed), per method, order, backbone.

        After Chaudhry et al. 2018; the reference of intransigence is joint training.
        """
        scores: dict[tuple, np.ndarray] = {}
        for path in self._files("continual/", "continual.csv"):
            frame = pd.read_csv(path, keep_default_na=False)
            seen = frame[frame["group"] == "seen"]
            about = tuple(frame.iloc[0][["method", "order", "backbone"]])
            for score, counted in SCORES.items():
                safe = seen.assign(safe=~seen["verdict"].isin(counted["harmful"]))
                table = safe.pivot_table("safe", "stage", "category") * 100
                by_task = [table.reindex(columns=list(t)).mean(axis=1) for t in _order(path)]
                # stages x tasks; a task without prompts (tiny test pools) has no score
                scores[(*about, score)] = np.array(by_task).T[1:]
        rows = []
        for (method, order, backbone, score), found in scores.items():
            about = {"method": method, "order": order, "backbone": backbone, "score": score}
            row = {**about, "forgetting": np.nan, "intransigence": np.nan}
            joint = scores.get(("joint", order, backbone, score))
            if not np.isnan(found).any():
                row["forgetting"] = forgetting(found)
                if joint is not None:
                    row["intransigence"] = intransigence(np.diag(joint), found)
            rows.append({**row, "safety after all": found[-1].mean()})
        return pd.DataFrame(rows)

    def costs(self) -> pd.DataFrame:
        """Seconds and peak memory of every method, one process each."""
        return pd.DataFrame(
            [json.loads(path.read_text()) for path in self._files("costs/", "cost.json")]
        )

    # ---- reading --------------------------------------------------------------------------------

    def _files(self, prefix: str, name: str) -> list[Path]:
        found = [p / name for unit, p in self.places.items() if unit.startswith(prefix)]
        if not found:
            raise SpkitError(f"the experiment has no unit {prefix}*")
        return found

    def _place(self, kind: str, method: str) -> Path:
        return self.places[f"{kind}/{slug(method)}"]

    def _answers(self, part: str) -> pd.DataFrame:
        """All answers of one part; tuned stays as it is."""
        frames = [
            pd.read_parquet(place / "answers.parquet")
            for unit, place in self.places.items()
            if unit.startswith("answers/")
            and unit.endswith(f"/{part}")
            and (place / "answers.parquet").is_file()  # a mask that changes nothing has none
        ]
        text = "tuned variant id group category phrasing verdict response".split()
        whole = pd.concat([f.astype(dict.fromkeys(text, "string")) for f in frames])
        return whole.astype(dict.fromkeys(text, "category")).reset_index(drop=True)

    def _methods(self) -> pd.DataFrame:
        """The answers of the methods; base's stand under either score for which was tuned."""
        answers = self._answers("methods").astype({"tuned": "string"})
        base = answers[answers["tuned"] == ""]
        rest = answers[answers["tuned"] != ""]
        return pd.concat([*(base.assign(tuned=score) for score in SCORES), rest])

    def _of(self, part: str) -> dict[tuple, Outcomes]:
        """_by_metric of the methods' or the ablations' answers; several tables share it."""
        if part not in self._compared:
            answers = self._methods() if part == "methods" else self._answers(part)
            self._compared[part] = _by_metric(answers, METRICS)
        return self._compared[part]

    def _draws(self, outcomes: Outcomes):
        _, backbones, derivations, masks, items = outcomes.values.shape
        return resample(backbones, derivations, masks, items, draws=self.draws, seed=0)

    def _over_metrics(self, compared: Mapping[tuple, Outcomes], table) -> pd.DataFrame:
        """table(outcomes, draws) of each, one below the other, with what they are of in front."""
        frames = []
        for (tuned, score, metric), outcomes in compared.items():
            frame = table(outcomes, self._draws(outcomes))
            frame.insert(0, "metric", metric)
            frame.insert(0, "score", score)
            frame.insert(0, "tuned", tuned)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)


def _by_metric(answers: pd.DataFrame, metrics: Iterable[str]) -> dict[tuple, Outcomes]:
    """{(tuned for which score, counted by which, metric): outcomes}."""
    return {
        (str(tuned), score, metric): _outcomes(part, metric, score)
        for tuned, part in answers.groupby("tuned", observed=True)
        for score in SCORES
        for metric in metrics
    }


def _outcomes(answers: pd.DataFrame, metric: str, score: str) -> Outcomes:
    rows = answers[answers["group"].isin(METRICS[metric][0])]
    columns = ["variant", "backbone", "derivation", "mask", "id", "verdict"]
    return Outcomes.from_frame(
        rows[columns].astype({"variant": str, "id": str, "verdict": str}), failed(metric, score)
    )


def _with_failures(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns "<group> <verdict>" (percent) replaced by "<score> <failure rate>"."""
    groups = ("seen ", "unseen ", "harmless ", "utility ")
    found = [column for column in frame if column.startswith(groups)]
    kept = frame.drop(columns=found)
    rows = frame[found].fillna(0.0).to_dict("records")
    for score in SCORES:
        for key in ("seen", "unseen", "refusal", "utility lost", "broken"):
            kept[f"{score} {key}"] = [failures(row, score)[key] for row in rows]
    return kept


def _order(path: Path) -> list[tuple[str, ...]]:
    """The categories of every stage, in the order in which that run met them."""
    return [tuple(stage) for stage in json.loads((path.parent / "stages.json").read_text())]


def write(places: Mapping[str, Path], folder: Path, *, draws: int, confidence: float) -> list[Path]:
    """All tables as CSV into `folder`; returns their paths."""
    tables = Tables(places, draws, confidence)
    return [save_csv(folder / f"{name}.csv", tables.table(name)) for name in TABLES]
