"""The short tables and sentences say what the experiment's tables say, and nothing else.

All tables are made by hand, so every cell that is expected here can be worked out by eye.
"""

import json
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from typer.testing import CliRunner

from spkit.cli import app
from spkit.comparison import publish, published, report, sentences
from spkit.comparison import run as experiment
from spkit.comparison.tables import METRICS, TABLES
from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.runs import stamp

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "method.md"
METHODS = ("GA", "SafePatching", "base", "SafePatching, balanced")  # base need not come first
ABLATED = ("SE only", "OSM only", "intersection", "SafePatching")
SCORES = ("paper", "strict")


def rates(values, tuned=SCORES, **extra):
    """methods, ablations or remains. values: {variant: {metric: mean}}; others are 50 ± 1."""
    rows = []
    for own in tuned:
        for score in SCORES:
            for variant, found in values.items():
                for metric in METRICS:
                    mean = found.get(metric, 50.0)
                    mean += 0 if own == score == "paper" else 20  # not to be taken for another's
                    row = {"tuned": own, "score": score, "metric": metric, "variant": variant}
                    row |= {"n_backbones": 5, "n_runs": 5, "n_items": 8, "mean": mean}
                    rows.append(row | {"low": mean - 1, "high": mean + 2} | extra)
    return pd.DataFrame(rows)


def gaps(values, reference="base", tuned=SCORES, backbones=5):
    """differences. values: {variant: {metric: (difference, low, high, below, above)}}."""
    rows = []
    for own in tuned:
        for score in SCORES:
            for variant, found in values.items():
                for metric in METRICS:
                    middle, low, high, below, above = found.get(metric, (0.0, -1.0, 1.0, 0, 0))
                    row = {"tuned": own, "score": score, "metric": metric, "variant": variant}
                    row |= {"reference": reference, "difference": middle, "low": low, "high": high}
                    clear = high < 0 or low > 0
                    row |= {"p": 0.001, "p_holm": 0.0004 if clear else 0.2}
                    row |= {"backbones_below": below, "backbones_above": above}
                    rows.append(row | {"backbones": backbones})
    return pd.DataFrame(rows)


FALLS = (-10.0, -12.0, -8.0, 4, 0)  # on 4 of 5 backbones
GOOD = {metric: FALLS for metric in ("harmful seen", "harmful unseen", "false refusal")}
KEPT = {"utility lost": (1.9, 0.5, 3.0, 0, 1)}


def wide(row, seen, refusal):
    """A row of sweeps, sizes or continual: the failure rates of both scores."""
    found = {"seen": seen, "unseen": seen + 2, "refusal": refusal, "utility lost": 4.0}
    found["broken"] = 6.0
    return row | {f"{score} {key}": value for score in SCORES for key, value in found.items()}


@pytest.fixture
def tables():
    swept = dict.fromkeys(sentences.SWEPT, np.nan)
    sweeps = [wide({"sweep": "retention", "backbone": 0, "mask": -1, **swept}, 0, 0)]
    for p, seen, refusal in ((0.1, 30, 10), (0.1, 10, 10), (0.9, 4, 2)):
        row = {"sweep": "retention", "backbone": 0, "mask": 0} | swept | {"retention_rate": p}
        sweeps.append(wide(row, seen, refusal))
    for a, b, seen in ((0.2, 0.4, 60), (0.2, 0.8, 8)):
        rates_of = {"top_rate_se": a, "top_rate_osm": b}
        row = {"sweep": "top-rates", "backbone": 0, "mask": 0} | swept | rates_of
        sweeps.append(wide(row, seen, 20))
    continual = [
        wide({"method": method, "order": order, "backbone": 0, "stage": stage}, harm, harm / 2)
        for method, harms in {"safepatching": (40, 20), "ga": (40, 60)}.items()
        for order in (0, 1)
        for stage, harm in zip((0, 3), (harms[0], harms[1] + 2 * order), strict=True)
    ]
    measures = pd.DataFrame({"method": ["safepatching", "safepatching", "ga"], "score": "paper"})
    measures = measures.assign(order=0, backbone=0, forgetting=[1.0, 3.0, np.nan])
    measures = measures.assign(intransigence=[-0.02, 0.01, np.nan])
    remains = [
        rates({"base": {"harmful seen": 60}, "SafePatching": found}, by=by, cell=cell)
        for by, cell, found in (
            ("phrasing", "plain", {"harmful seen": 70, "harmful unseen": 9}),
            ("phrasing", "wrapper", {"harmful seen": 3, "harmful unseen": 9}),
            ("category", "gluing", {"harmful seen": 4, "harmful unseen": 9}),
        )
    ]
    each = {"variant": "GA", "backbone": 0, "rate": 1.0, "reference_rate": 3.0, "difference": -2.0}
    each |= {"tuned": "paper", "score": "paper", "metric": "harmful seen", "low": -4.0, "high": 0}
    area = {"hypervolume": [0.9, 0.8], "low": [0.88, 0.7], "high": [0.92, 0.85]}
    area |= {"method": ["SafePatching", "GA"], "against": "SafePatching", "settings": [3, 2]}
    area |= {"difference": [np.nan, -0.1], "p": [np.nan, 0.01], "p_holm": [np.nan, 0.01]}
    area |= {"difference_low": [np.nan, -0.2], "difference_high": [np.nan, -0.05]}
    setting = {"retention_rate": 0.3, "alpha": 1.23456}
    chosen = {"method": "SafePatching", "score": "paper", "trials": 60, "trial": 7, "cost": 0.4}
    chosen |= {"setting": json.dumps(setting), "seen": 3.0, "unseen": 4.0, "refusal": 5.0}
    chosen |= {"utility lost": 2.5, "broken": 1.0}
    cost = {"method": "GA", "derive_seconds": 40.5, "combine_seconds": 0.1, "peak_mib": 900.0}
    about = {"command": "make experiment BUDGET=full", "backbone seeds": "0, 1, 2, 3, 4"}
    about |= {"derivations": "2", "masks": "4", "trials": "60", "draws": "10000"}
    about |= {"confidence": "0.95", "commit": "0123456789", "machine: cpu": "a CPU"}
    about |= {"machine: cores": "2", "machine: memory_gib": "23.5", "machine: gpu": "None"}
    methods = {name: {} for name in METHODS} | {"SafePatching": {"harmful": 10, "utility lost": 4}}
    methods |= {"GA": {"harmful": 5, "false refusal": 40, "harmful seen": 12.34}}
    return {
        "methods": rates(methods),
        "differences": gaps({"SafePatching": GOOD | KEPT, "SafePatching, balanced": {}}),
        "against": gaps({"GA": {"harmful": FALLS, "false refusal": FALLS}}, "SafePatching"),
        "per_backbone": pd.DataFrame([each]),
        "hypervolumes": pd.concat([pd.DataFrame(area).assign(score=score) for score in SCORES]),
        "ablations": rates({name: {} for name in ABLATED}, tuned=("paper",)),
        "ablation_differences": gaps(
            {"SE only": {"harmful": FALLS, "harmful seen": FALLS}}, "SafePatching", ("paper",)
        ),
        "remains": pd.concat(remains, ignore_index=True),
        "moves": pd.DataFrame(
            {"group": "seen", "phrasing": "plain", "before": "refusal", "after": ["broken"] * 2,
             "k": [1, 3], "n": 8, "tuned": SCORES}
        ),
        "broken": pd.DataFrame(
            {"tuned": "paper", "backbone": 0, "group": "seen", "phrasing": "plain",
             "response": ["", "the the"], "k": [5, 2]}
        ),
        "sweeps": pd.DataFrame(sweeps),
        "sizes": pd.DataFrame(
            [wide({"size": "1 M", "weights": 9, "backbone": b, "variant": "base"}, b, 8)
             for b in (0, 1)]
        ),
        "continual": pd.DataFrame(continual),
        "continual_measures": measures,
        "costs": pd.DataFrame([cost | {"peak_mib_before": 500.0}]),
        "settings": pd.DataFrame([chosen]),
        "about": pd.DataFrame({"key": list(about), "value": list(about.values())}),
    }  # fmt: skip


def rows(frame, key="method"):
    return frame.set_index(key).T.to_dict()


# ---- reading -------------------------------------------------------------------------------------


def save(tables, folder):
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)


def test_tables_are_read_as_they_were_written(tables, tmp_path):
    save(tables, tmp_path)
    found = report.read_tables(tmp_path)
    assert set(found) == {*TABLES, "about"}
    assert list(found["broken"]["response"]) == ["", "the the"]
    pd.testing.assert_frame_equal(found["methods"], tables["methods"], check_dtype=False)
    assert publish.markdown(found) == publish.markdown(tables)


@pytest.mark.parametrize("name", ["sweeps", "about"])
def test_a_missing_table_is_named_with_the_command_that_makes_it(tables, tmp_path, name):
    save(tables, tmp_path)
    (tmp_path / f"{name}.csv").unlink()
    with pytest.raises(SpkitError, match=rf"{name}\.csv is missing.*`make experiment`"):
        report.read_tables(tmp_path)


def test_a_table_that_is_empty_is_named(tables, tmp_path):
    save(tables, tmp_path)
    (tmp_path / "costs.csv").write_text("")
    with pytest.raises(SpkitError, match=r"costs\.csv: cannot be read"):
        report.read_tables(tmp_path)


# ---- the comparison ------------------------------------------------------------------------------


def test_comparison_has_base_first_and_the_intervals(tables):
    frame = report.comparison(tables, "paper")
    assert list(frame["method"]) == ["base", "GA", "SafePatching", "SafePatching, balanced"]
    assert list(frame.columns) == ["method", *report.COLUMNS]
    found = rows(frame)
    assert found["GA"]["harmful seen %"] == "12.3 [11.3, 14.3]"
    # failures of 4 [3, 6] are successes of 96 [94, 97]
    assert found["SafePatching"]["utility %"] == "96.0 [94.0, 97.0]"
    assert rows(report.comparison(tables, "strict"))["GA"]["harmful seen %"] == "32.3 [31.3, 34.3]"


def test_an_unknown_score_is_an_error(tables):
    with pytest.raises(SpkitError, match="no score 'papers', allowed: paper, strict"):
        report.comparison(tables, "papers")


def test_what_is_not_there_is_an_empty_cell(tables):
    table = tables["methods"]
    gone = (table["variant"] == "GA") & (table["metric"] == "false refusal")
    tables["methods"] = table[~gone]
    table = tables["methods"]
    table.loc[(table["variant"] == "GA") & (table["metric"] == "harmful seen"), "mean"] = np.nan
    found = rows(report.comparison(tables, "paper"))["GA"]
    assert (found["false refusal %"], found["harmful seen %"]) == ("", "")


def test_differences_are_starred_where_they_are_clear_and_utility_is_turned(tables):
    found = rows(report.differences(tables, "paper"))["SafePatching"]
    assert found["harmful seen"] == "-10.0 [-12.0, -8.0] *"
    assert found["utility"] == "-1.9 [-3.0, -0.5] *"
    assert rows(report.differences(tables, "paper"))["SafePatching, balanced"]["utility"] == (
        "0.0 [-1.0, 1.0]"
    )
    assert list(report.against_safepatching(tables, "paper")["method"]) == ["GA"]


def goals(tables, found, backbones=5):
    tables["differences"] = gaps({"SafePatching": found}, backbones=backbones)
    frame = report.goal(tables, "paper")
    return dict(zip(frame["objective"], frame["met"], strict=True))


def test_a_goal_that_is_met(tables):
    tables["differences"] = gaps({"SafePatching": GOOD | KEPT})
    frame = report.goal(tables, "paper")
    assert list(frame["objective"]) == [
        "harmful seen",
        "harmful unseen",
        "false refusal",
        "utility",
    ]
    assert list(frame["met"]) == ["yes"] * 4
    assert list(frame["backbones below 0"]) == ["4 of 5"] * 3 + ["1 of 5"]
    assert frame["minus base"][3] == "-1.9 [-3.0, -0.5]"
    assert frame["p (Holm)"][0] == "< 0.001"


@pytest.mark.parametrize(
    ("metric", "cell", "missed"),
    [
        ("false refusal", (-10.0, -12.0, -8.0, 3, 0), "false refusal"),  # one backbone too few
        ("harmful seen", (-10.0, -20.0, 0.0, 5, 0), "harmful seen"),  # the interval touches 0
        ("harmful unseen", (10.0, 8.0, 12.0, 0, 5), "harmful unseen"),
        ("utility lost", (2.1, 1.0, 3.0, 0, 0), "utility"),
    ],
)
def test_a_goal_that_is_missed_in_one_place(tables, metric, cell, missed):
    found = goals(tables, GOOD | KEPT | {metric: cell})
    assert [name for name, met in found.items() if met == "no"] == [missed]
    said = sentences.comparison(tables, "paper")
    assert f"SafePatching misses {missed}." in said


@pytest.mark.parametrize(
    ("backbones", "below", "met"), [(3, 2, "yes"), (3, 1, "no"), (1, 1, "yes"), (1, 0, "no")]
)
def test_all_backbones_but_one_must_agree(tables, backbones, below, met):
    cell = (-10.0, -12.0, -8.0, below, 0)
    assert goals(tables, {"harmful seen": cell}, backbones)["harmful seen"] == met


def test_utility_that_rises_meets_the_goal(tables):
    assert goals(tables, {"utility lost": (-9.0, -10.0, -8.0, 5, 0)})["utility"] == "yes"


def test_hypervolumes_of_both_scores_stand_side_by_side(tables):
    found = rows(report.hypervolume(tables))
    assert found["SafePatching"]["paper: area"] == "0.900 [0.880, 0.920]"
    assert found["SafePatching"]["strict: minus SafePatching"] == ""
    assert found["GA"]["strict: minus SafePatching"] == "-0.100 [-0.200, -0.050] *"
    assert found["GA"]["paper: settings"] == 2


def test_sentences_name_who_is_better_in_both(tables):
    said = sentences.comparison(tables, "paper")
    assert "Lower harm and lower false refusal than SafePatching: GA." in said
    assert "Of these, both differences are clear of chance (Holm, p < 0.05): GA." in said
    assert "On the front (no method is better in both): GA." in said
    assert "Lowest harmful rate among the methods: GA (5.0 %)." in said
    assert "SafePatching meets all of the goal." in said
    assert "SafePatching, balanced misses harmful seen; harmful unseen; false refusal." in said


def test_base_wins_nothing_among_the_methods(tables):
    table = tables["methods"]
    table.loc[table["variant"] == "base", "mean"] = 0.0
    said = sentences.comparison(tables, "paper")
    assert "Lowest harmful rate among the methods: GA (5.0 %)." in said
    assert "On the front (no method is better in both): base." in said


def test_one_clear_difference_is_not_two(tables):
    tables["against"] = gaps({"GA": {"harmful": FALLS}}, "SafePatching")
    said = sentences.comparison(tables, "paper")
    assert "Of these, both differences are clear of chance (Holm, p < 0.05): none." in said


# ---- the other tables ----------------------------------------------------------------------------


def test_ablations_are_starred_against_safepatching(tables):
    found = rows(report.ablation(tables), "variant")
    assert found["SE only"]["harmful seen %"] == "50.0 [49.0, 52.0] *"
    assert found["OSM only"]["harmful seen %"] == "50.0 [49.0, 52.0]"
    # tuned once, but counted by either score
    assert rows(report.ablation(tables, "strict"), "variant")["OSM only"]["harmful seen %"] == (
        "70.0 [69.0, 72.0]"
    )
    said = sentences.ablation(tables)
    assert "harmful, clearly lower than SafePatching: SE only." in said
    assert "harmful, clearly higher than SafePatching: none." in said


def test_sweeps_are_told_by_their_best_and_worst_point_without_base(tables):
    low, high, best, _ = sentences.sweeps(tables)
    assert "retention: the mean of harm and false refusal is lowest at retention_rate 0.9" in low
    assert "(harm 5.0 %, false refusal 2.0 %, broken 6.0 %)" in low
    assert "highest at retention_rate 0.1 (harm 21.0 %" in high  # over two masks
    assert "top-rates" in best and "top_rate_se 0.2, top_rate_osm 0.8 (harm 9.0 %" in best
    assert "broken text" not in "".join(sentences.sweeps(tables))


def test_a_point_that_breaks_its_answers_is_not_called_the_best(tables):
    table = tables["sweeps"]
    table.loc[table["top_rate_osm"] == 0.8, "paper broken"] = 46.0
    table.loc[table["retention_rate"].notna(), "paper broken"] = [60.0, 76.0, 50.0]
    low, high, best, worst = sentences.sweeps(tables)
    assert low.startswith("retention: no point has at most 10 % broken text; the least is at ")
    assert "retention_rate 0.9 (harm 5.0 %, false refusal 2.0 %, broken 50.0 %)." in low
    assert "highest at retention_rate 0.1 (harm 21.0 %" in high
    assert "lowest at top_rate_se 0.2, top_rate_osm 0.4 (harm 61.0 %" in best
    assert best.endswith(", of the 1 points with at most 10 % broken text.")
    assert "highest at top_rate_se 0.2, top_rate_osm 0.4" in worst


def test_who_pays_with_broken_text_or_utility_is_said(tables):
    said = sentences.comparison(tables, "paper")
    assert any(one.startswith("More than 10 % broken text on harmful prompts: GA (50.0 %); Safe")
               for one in said)  # fmt: skip
    assert "Lowest utility: GA; SafePatching, balanced (50.0 %)." in said
    table = tables["methods"]
    table.loc[table["metric"].isin(["broken on harmful", "utility lost"]), "mean"] = 0.0
    said = sentences.comparison(tables, "paper")
    assert "More than 10 % broken text on harmful prompts: none." in said
    assert "Lowest utility: none (100.0 %)." in said
    tables["continual"].loc[tables["continual"]["method"] == "ga", "paper broken"] = 12.5
    assert sentences.continual(tables)[-1] == (
        "More than 10 % broken text after the last stage: GA (12.5 %)."
    )


def test_sizes_are_means_over_their_backbones(tables):
    (row,) = report.sizes(tables, "paper").to_dict("records")
    assert (row["harmful seen %"], row["utility %"], row["backbones"]) == ("0.5", "96.0", 2)


def test_withdrawn_sizes_are_not_shown_and_it_is_said_why(tables):
    assert report.withdrawn(tables) == "" and "Withdrawn" not in publish.markdown(tables)
    more = [wide({"size": s, "weights": 7, "backbone": 0, "variant": "base"}, 1, 8) for s in "xyz"]
    tables["sizes"] = pd.concat([tables["sizes"], pd.DataFrame(more)], ignore_index=True)
    tables["sizes"]["withdrawn"] = [np.nan, np.nan, np.nan, "So.", "So."]
    assert list(report.sizes(tables, "paper")["size"]) == ["1 M", "x"]
    assert set(report.current(tables["sizes"])["size"]) == {"1 M", "x"}
    said = "Withdrawn until they are made again: the sizes y and z. So."
    assert report.withdrawn(tables) == said
    for text in (publish.BLOCKS["sizes"](tables), publish.markdown(tables)):
        assert said in text and "| y " not in text


def test_the_committed_rows_on_wrong_weights_are_withdrawn():
    """Made with widths of 432 and 752; `make publish` of new tables takes the mark away."""
    tables = report.read_tables(Path(__file__).parents[2] / "docs" / "experiment")
    old = tables["sizes"]["weights"].isin([993876, 4806540])
    assert not old.any() or tables["sizes"].loc[old, "withdrawn"].notna().all()
    shown = report.sizes(tables, "paper")
    assert not shown["weights"].isin([993876, 4806540]).any() and len(shown) >= 11


def test_continual_shows_the_last_stage_with_its_range(tables):
    found = rows(report.continual(tables))
    assert found["SafePatching"]["harmful seen %"] == "21.0 [20.0, 22.0]"
    assert found["SafePatching"]["forgetting"] == "2.0 [1.0, 3.0]"
    assert found["SafePatching"]["intransigence"] == "0.0 [0.0, 0.0]"  # and no "-0.0"
    assert (found["GA"]["runs"], found["GA"]["forgetting"]) == (2, "")
    said = sentences.continual(tables)
    assert "After the last stage harm (seen) is lowest for SafePatching (21.0 %)." in said
    assert "Above base in harm (seen) after the last stage: GA." in said


def test_what_remains_stands_beside_base(tables):
    frame = report.remaining(tables, "paper")
    (row,) = frame[(frame["metric"] == "harmful seen") & (frame["phrasing"] == "plain")].to_dict(
        "records"
    )
    assert row["prompts"] == 8 and row["base %"] == "60.0 [59.0, 62.0]"
    assert row["SafePatching %"] == "70.0 [69.0, 72.0]"
    assert set(report.remaining(tables, "paper", "category")["category"]) == {"gluing"}
    said = sentences.remaining(tables, "paper")
    assert said[0] == "By phrasing, most harm is left in plain (harmful seen): 70.0 %, base 60.0 %."
    assert said[1] == "More harm than base in 1 of 4 cells by phrasing: plain (harmful seen)."


def test_moves_are_of_one_score_in_percent(tables):
    (row,) = report.moves(tables, "strict").to_dict("records")
    assert (row["before"], row["after"], row["n"], row["%"]) == ("refusal", "broken", 8, "37.5")


def test_settings_and_costs_are_readable(tables):
    (row,) = report.settings(tables).to_dict("records")
    assert row["setting"] == "retention_rate 0.3, alpha 1.23"
    assert (row["dev false refusal %"], row["dev utility %"]) == ("5.0", "97.5")
    (row,) = report.costs(tables).to_dict("records")
    assert row["method"] == "GA" and row["peak memory [MiB]"] == 900.0


def test_the_caption_says_how_it_was_made(tables):
    text = report.caption(tables)
    for part in ("5 backbones, 2 derivations each, 4 masks each", "8 seen, 8 unseen, 8 harmless",
                 "60 trials a method", "95 % intervals", "10,000 draws", "commit 0123456,",
                 "`make experiment BUDGET=full`", "on a CPU (2 cores, 23.5 GiB)."):  # fmt: skip
        assert part in text, part
    tables["about"].loc[tables["about"]["key"] == "machine: gpu", "value"] = "a GPU"
    tables["about"].loc[tables["about"]["key"] == "masks", "value"] = "1"
    text = report.caption(tables)
    assert "23.5 GiB, a GPU)" in text and "1 mask each" in text


# ---- the paper's figures -------------------------------------------------------------------------


def test_the_papers_figures_are_those_of_the_page():
    lines = PAGE.read_text(encoding="utf-8").partition("## 9. ")[2].splitlines()
    head, _, *body = (line.strip("|").split("|") for line in lines if line.startswith("|"))
    head = [cell.strip() for cell in head]
    there = {}
    for line in body:
        row = dict(zip(head, (cell.strip() for cell in line), strict=True))
        there[row["model"]] = row
    assert head == ["model", *published.COLUMNS]
    assert list(there) == list(published.FIGURES)
    for name, figures in published.FIGURES.items():
        page = [there[name][column] for column in published.COLUMNS]
        assert [float(cell) if cell else None for cell in page] == list(figures), name
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    (ours, mt), (npo, npo_mt) = published.CONTINUAL["SafePatching"], published.CONTINUAL["NPO"]
    assert (
        f"of {ours} % on average and an MT-Bench score of {mt}; NPO has {npo} % and {npo_mt}."
        in (text)
    )


def test_the_papers_table_shows_some_rows_and_columns():
    shown = published.table(["GA", "original"], ["OKTest refusal %", "AdvBench harmful %"])
    assert shown.to_dict("index") == {
        "GA": {"OKTest refusal %": "", "AdvBench harmful %": "0.58"},
        "original": {"OKTest refusal %": "", "AdvBench harmful %": "31.73"},
    }
    assert published.table().shape == (10, 7) and published.table().loc["ROSE", "ATGR"] == "2.08"


def test_ours_and_the_papers_are_labelled_and_what_is_unknown_stays_empty(tables):
    found = rows(report.comparison_with_paper(tables), "row")
    assert list(found) == list(report.OURS) and set(found) <= set(published.FIGURES)
    names = [name for name in found["GA"] if not name.startswith("ours: ")]
    assert names == [f"paper, LLaMA-2-7B-Chat: {column}" for column in published.COLUMNS[:5]]
    assert found["GA"]["ours: harmful seen %"] == "12.3 [11.3, 14.3]"
    assert found["SE patch alone"]["ours: harmful seen %"] == "50.0 [49.0, 52.0]"
    assert found["TIES-Merging"]["ours: harmful seen %"] == ""  # not in these tables
    assert found["GA"]["paper, LLaMA-2-7B-Chat: AdvBench harmful %"] == "0.58"
    assert found["original"]["paper, LLaMA-2-7B-Chat: BeaverTails harmful %"] == ""


# ---- markdown ------------------------------------------------------------------------------------


def test_markdown_leaves_cells_as_they_are_and_nan_empty():
    text = report.to_markdown(pd.DataFrame({"a": ["0.10", "1"], "b": [np.nan, "x"]}))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0] == ["a", "b"] and lines[2:] == [["0.10", ""], ["1", "x"]]


def test_everything_is_printed(tables):
    text = publish.markdown(tables)
    assert "nan" not in text.lower() and "-0.0 " not in text
    for heading in ("Comparison, paper score", "Comparison, strict score", "Costs", "Settings",
                    "Hypervolumes", "Beside the paper's figures"):  # fmt: skip
        assert f"\n## {heading}\n" in text


@pytest.mark.parametrize("page", [False, True])
def test_the_command_prints_the_tables_or_fills_a_page(tables, page, tmp_path):
    save(tables, tmp_path)
    written = tmp_path / "page.md"
    written.write_text("<!-- table: caption -->\nold\n<!-- end -->\n")
    found = CliRunner().invoke(
        app, ["report", str(tmp_path), *(["--into", str(written)] if page else [])]
    )
    assert found.exit_code == 0
    caption = report.caption(report.read_tables(tmp_path))
    if page:
        assert written.read_text() == f"<!-- table: caption -->\n\n{caption}\n\n<!-- end -->\n"
    else:
        assert found.stdout == publish.markdown(report.read_tables(tmp_path)) + "\n"


def test_the_command_says_what_is_missing(tmp_path):
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 1 and "methods.csv is missing" in " ".join(found.output.split())


# ---- notebook 05 ---------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository's root with the notebook, and with the folder of an experiment."""
    monkeypatch.chdir(tmp_path)
    Path("notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(), f"notebooks/{experiment.NOTEBOOK}")
    Path("outputs/full/tables").mkdir(parents=True)
    return tmp_path


def test_the_experiment_ends_with_the_notebook_on_its_own_tables(root, monkeypatch):
    asked = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: asked.append((*a, k)))
    executed = experiment.show(Config(run_name="mine"), Path("outputs/full/tables"))
    assert executed == Path("outputs/full/05_comparison.ipynb")
    ((source, copy, values, _),) = asked
    assert (source, copy) == (Path("notebooks/05_comparison.ipynb"), executed)
    assert values["comparison"] == {"tables": str(Path("outputs/full/tables"))}
    assert Config.from_sources(values).run_name == "mine"


def test_a_notebook_that_fails_is_one_sentence(root, monkeypatch):
    def fail(source, copy, *_, **__):
        told = {"ename": "SpkitError", "evalue": "no table", "traceback": []}
        cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("error", **told)])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), copy)
        raise papermill.exceptions.PapermillExecutionError(0, 1, "1", "SpkitError", "no table", [])

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    with pytest.raises(SpkitError, match="05_comparison failed: SpkitError: no table"):
        experiment.show(Config(), Path("outputs/full/tables"))


def test_without_the_notebook_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert experiment.show(Config(), tmp_path) is None


def test_other_tables_make_the_stage_outdated_and_no_other(root):
    stages = ("05_comparison", "00_backbone")

    def stamps(**values):
        return [stamp(Config(**values), stage).name for stage in stages]

    before = stamps(comparison={"tables": "outputs/full/tables"})  # an empty folder is no error
    assert before == stamps(comparison={"tables": "outputs/full/tables"})
    Path("outputs/full/tables/a.csv").write_text("a\n1\n")
    after = stamps(comparison={"tables": "outputs/full/tables"})
    assert after[0] != before[0] and after[1] == before[1]
    Path("outputs/full/tables/a.csv").write_text("a\n2\n")
    assert stamps(comparison={"tables": "outputs/full/tables"})[0] not in (before[0], after[0])


# ---- pages ---------------------------------------------------------------------------------------


def test_marked_blocks_are_made_anew_and_the_rest_is_left_alone(monkeypatch):
    monkeypatch.setitem(publish.BLOCKS, "caption", lambda tables: f"of {tables['name']}")
    page = "before\n<!-- table: caption -->\nold\n<!-- end -->\nafter\n"
    made = publish.fill(page, {"name": "two backbones"})
    assert made == "before\n<!-- table: caption -->\n\nof two backbones\n\n<!-- end -->\nafter\n"
    assert publish.fill(made, {"name": "two backbones"}) == made


def test_an_unknown_block_is_an_error_that_names_it():
    with pytest.raises(SpkitError, match="no block 'captoin', did you mean caption"):
        publish.fill("<!-- table: captoin -->\n<!-- end -->", {})


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md", "docs/results.md"])
def test_pages_show_the_committed_tables(page):
    """`make publish` was run after the last change of the tables or of how they are shown."""
    root = Path(__file__).parents[2]
    text = (root / page).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert publish.fill(text, report.read_tables(root / "docs/experiment")) == text
