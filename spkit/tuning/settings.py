"""Which settings a method has, as Optuna draws them, and where they stand in a params file.

The spaces are those of comparison/methods, on wider ranges: a backbone of one's own may be far from
the sandbox. To them come `scale` (SafePatching alone) and `stop`, the number of the ascent's kept
state. `plain` strengths are not divided by the norm of what is kept, so they are drawn four times
as large.
"""

from collections.abc import Mapping, Sequence

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from spkit.comparison.methods import METHODS
from spkit.config import Config
from spkit.evaluation.labels import BALANCED
from spkit.method.safepatching import NAME as SAFEPATCHING

WIDER = {
    "retention_rate": ("uniform", 0.1, 1.0),
    "top_rate_se": ("log", 0.005, 0.9),
    "top_rate_osm": ("log", 0.005, 0.9),
    "alpha": ("ratio", "beta", 0.1, 10.0),
}
PLAIN_FACTOR = 4.0
STRENGTHS = ("alpha", "beta")
# method -> its name in continual.settings, where a params file has a place for its settings
IN_CONTINUAL = {"GA": "ga", "NPO": "npo", "Task Arithmetic": "task_arithmetic"}


class Space:
    """The settings of one method: drawn by Optuna as `distributions`, read back by `setting`.

    scales: those of patching.scale that are tried. stops: how many states of the ascent are kept.
    """

    def __init__(self, method: str, scales: Sequence[str], stops: int):
        own = METHODS[method].space
        self.domains = {key: WIDER.get(key, domain) for key, domain in own.items()}
        self.names = {}  # key of a setting -> the name of what is drawn for it
        self.distributions: dict[str, BaseDistribution] = {}
        for key, (kind, *values) in self.domains.items():
            self.names[key] = f"{key}/{values[0]}" if kind == "ratio" else key
            self.distributions[self.names[key]] = _distribution(kind, values)
        if method == SAFEPATCHING:
            self.distributions["scale"] = CategoricalDistribution(list(scales))
        if "se" in METHODS[method].needs:
            self.distributions["stop"] = CategoricalDistribution(list(range(stops)))

    def setting(self, drawn: Mapping) -> dict:
        """The setting of what was drawn; three digits, so that a table shows what was run."""
        found: dict = {}
        plain = drawn.get("scale") == "plain"
        for key, (kind, *values) in self.domains.items():
            value = drawn[self.names[key]]
            if kind == "ratio":
                value *= found[values[0]]
            elif plain and key in STRENGTHS:
                value *= PLAIN_FACTOR
            found[key] = value if kind == "choice" else float(f"{value:.3g}")
        return found | {key: drawn[key] for key in ("scale", "stop") if key in drawn}

    def drawn(self, setting: Mapping) -> dict:
        """The nearest that can be drawn to a setting that was chosen by hand."""
        found = {}
        plain = setting.get("scale") == "plain" and "plain" in self._scales()
        for key, (kind, *values) in self.domains.items():
            value = setting[key]
            if kind == "ratio":
                value /= max(setting[values[0]], 1e-9)
            elif plain and key in STRENGTHS:
                value /= PLAIN_FACTOR
            found[self.names[key]] = value
        found |= {key: setting[key] for key in ("scale", "stop") if key in setting}
        for name, distribution in self.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                if found.get(name) not in distribution.choices:
                    found[name] = distribution.choices[-1]
            else:
                found[name] = min(max(found[name], distribution.low), distribution.high)
        return found

    def _scales(self) -> tuple:
        known = self.distributions.get("scale")
        return known.choices if known is not None else ()


def _distribution(kind: str, values: Sequence) -> BaseDistribution:
    if kind == "choice":
        return CategoricalDistribution(list(values))
    low, high = values[-2:]
    return FloatDistribution(low, high, log=kind in ("log", "ratio"))


def with_setting(config: Config, method: str, setting: Mapping, stops: Sequence[float]) -> Config:
    """The config with the setting in its place, and the ascent's stop that goes with it.

    Methods without a place in a params file (TIES, DARE ...) leave all but the stop as it was.
    """
    dumped = config.model_dump(mode="json")
    own = {key: value for key, value in setting.items() if key not in ("scale", "stop", "target")}
    if method == SAFEPATCHING:
        scale = {"scale": setting["scale"]} if "scale" in setting else {}
        dumped["patching"] |= {**own, **scale, "balance": None}
    elif method == BALANCED:
        dumped["patching"] |= {**own, "scale": "norm_matched", "balance": setting["target"]}
    elif method in IN_CONTINUAL:
        dumped["continual"]["settings"][IN_CONTINUAL[method]] = own
    if "stop" in setting:
        dumped["derivation"]["ascent"]["stop_mean_loss"] = stops[setting["stop"]]
    return Config.from_sources(dumped)
