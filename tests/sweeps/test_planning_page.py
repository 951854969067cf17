"""docs/planning.md shows what its command prints."""

import importlib.util
from pathlib import Path

import pytest

from spkit.running.forecast import DEVICES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def planning():
    path = ROOT / "benchmarks" / "planning.py"
    spec = importlib.util.spec_from_file_location("planning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["planned", "shared", "measured"])
def test_the_tables_are_those_of_the_command(planning, name, monkeypatch):
    """Else: python benchmarks/planning.py --into docs/planning.md."""
    monkeypatch.chdir(ROOT)
    assert planning.markdown(planning.TABLES[name]) in PAGE


def test_the_plan_of_the_papers_grid_is_that_of_the_command(planning, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert planning.paper("a100") in PAGE


def test_the_page_names_the_devices_numbers():
    for name in ("t4", "a100", "h100", "h200"):
        device = DEVICES[name]
        assert f"{device.half / 1e12:.0f}" in PAGE and f"{device.bandwidth / 1e9:,.0f}" in PAGE
    cpu = DEVICES["cpu"]
    assert f"{cpu.single / 1e9:.0f} GFLOP/s in fp32, {cpu.half / 1e9:.0f} in bf16" in PAGE
    assert f"({cpu.share:.0%}".replace("%", " %") in PAGE and f"({cpu.layer * 1e3:g} ms)" in PAGE
