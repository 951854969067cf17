"""`spkit patch` from a params file to the report, on a backbone that has hardly learnt to speak."""

from pathlib import Path

import pytest

from spkit.tuning.patch import patch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report's path."""
    context = pytest.MonkeyPatch()
    context.chdir(ROOT)
    outputs = tmp_path_factory.mktemp("patch") / "outputs"
    few = {"trials": 3, "judged": 1, "prompts_per_cell": 4}
    given = {f"tuning.{key}": value for key, value in few.items()} | {"outputs": str(outputs)}
    yield patch(ROOT / "params" / "micro.yaml", given)
    context.undo()


def test_the_page_names_what_was_chosen_and_what_it_does(report):
    text = report.read_text(encoding="utf-8")
    assert "## Chosen on dev" in text and "(chosen)" in text
    assert "harmful unseen %" in text and "| SafePatching" in text
    assert "*SafePatching* against *base*" in text and "perplexity" in text


def test_patch_and_checkpoint_are_there_and_continual_was_not_run(report):
    made = report.parent / "03_controllable_patching"
    assert (made / "patch.safetensors").is_file() and (made / "model" / "config.json").is_file()
    assert report.parent.parent.name == "micro-tuned"
    assert not (report.parent / "04_continual_psa").exists()
