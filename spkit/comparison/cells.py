"""One cell of a table: a number with its interval, as text."""

import numpy as np
import pandas as pd


def flipped(cell: pd.Series, name: str, total: float = 0.0) -> pd.Series:
    """Failures as successes: total minus the value, with the interval's ends exchanged."""
    new = cell.copy()
    # + 0.0: a negative zero would be shown
    new[[name, "low", "high"]] = [total - cell[key] + 0.0 for key in (name, "high", "low")]
    return new


def interval(cell: pd.Series, name: str = "mean", digits: int = 1) -> str:
    """As "value [low, high]"; empty where there is no value, without brackets where no interval."""
    if pd.isna(cell[name]):
        return ""
    middle, low, high = (number(cell[key], digits) for key in (name, "low", "high"))
    return f"{middle} [{low}, {high}]" if low and high else middle


def starred(cell: pd.Series, digits: int = 1) -> str:
    """A difference with its interval; "*": p < 0.05 after Holm."""
    star = " *" if not pd.isna(cell["p_holm"]) and cell["p_holm"] < 0.05 else ""
    return interval(cell, "difference", digits) + star


def span(values: pd.Series) -> str:
    """As "mean [lowest, highest]"."""
    values = values.dropna()
    if values.empty:
        return ""
    return interval(pd.Series({"mean": values.mean(), "low": values.min(), "high": values.max()}))


def number(value: float, digits: int = 1) -> str:
    """Rounded; empty for nan, and never "-0.0"."""
    return "" if pd.isna(value) else f"{np.round(float(value), digits) + 0.0:.{digits}f}"


def p_value(value: float) -> str:
    """Three digits, or that it is less."""
    if pd.isna(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def names(found) -> str:
    """Names in a sentence; some hold a comma."""
    return "; ".join(map(str, found)) or "none"


def count(number, noun: str) -> str:
    """As "1 mask" or "2 masks"."""
    return f"{number} {noun}{'' if str(number) == '1' else 's'}"
