"""The first cell of every notebook: does nothing where all is there, never replaces torch."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from spkit.errors import SpkitError
from spkit.running import colab
from spkit.running.notebook import _check_names
from spkit.running.runs import STAGES

ROOT = Path(__file__).parents[2]
PYPROJECT = ROOT / "pyproject.toml"


def project(folder, *dependencies, more=""):
    lines = "".join(f"  {text!r},\n" for text in dependencies)
    path = folder / "pyproject.toml"
    path.write_text(f'[project]\nname = "spkit"\ndependencies = [\n{lines}]\n{more}')
    return path


def distribution(folder, name, version):
    """A library that is installed, as far as its metadata says."""
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (place / "top_level.txt").write_text(f"{name}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed libraries before all others."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


class Pip:
    """In place of subprocess.run: keeps the commands and what the constraints file held."""

    def __init__(self, does=lambda: None, code=0, stderr=""):
        self.commands, self.constraints = [], []
        self.does, self.code, self.stderr = does, code, stderr

    def __call__(self, command, **_):
        self.commands.append(command)
        if "--constraint" in command:
            path = Path(command[command.index("--constraint") + 1])
            self.constraints = path.read_text().splitlines()
        self.does()
        return SimpleNamespace(returncode=self.code, stderr=self.stderr)


def no_runner(*_, **__):
    raise AssertionError("nothing is to be installed")


# ---- the cell ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_code_cell_of_a_notebook_is_the_same_everywhere(stage):
    cells = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4).cells
    first, second = [cell for cell in cells if cell.cell_type == "code"][:2]
    assert first.source == colab.first_cell()
    assert "colab" in first.metadata.tags and "parameters" in second.metadata.tags


def run_cell(folder, *options, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COLAB_RELEASE_TAG")}
    command = [sys.executable, *options, "-c", colab.first_cell()]
    return subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True
    )


def test_the_cell_does_nothing_where_all_is_installed(tmp_path):
    for folder in (ROOT, ROOT / "notebooks", tmp_path):  # the last: spkit is found without a clone
        ended = run_cell(folder)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), folder


def test_the_cell_reports_in_colab_and_names_no_path():
    ended = run_cell(ROOT / "notebooks", COLAB_RELEASE_TAG="release")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("Python 3") and "What will fit" in ended.stdout
    assert str(ROOT) not in ended.stdout and str(Path.home()) + "/" not in ended.stdout


def test_without_a_clone_the_cell_says_to_make_one(tmp_path):
    ended = run_cell(tmp_path, "-S")  # no installed packages
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "ModuleNotFoundError: No module named 'spkit'"
    assert "(first clone the repository and change into it)" in colab.first_cell()


def test_the_cell_defines_no_name_that_is_taken_for_a_parameter(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    namespace = {}
    exec(colab.first_cell(), namespace)
    _check_names(namespace)
    with pytest.raises(SpkitError, match="unknown parameter places"):
        _check_names({"places": namespace["sys"].path})


# ---- what is missing -----------------------------------------------------------------------------


def test_missing_are_those_that_no_installed_version_satisfies(tmp_path, site):
    for name, version in (("old", "1.9"), ("new", "2.0.1+cu126"), ("early", "3.1rc1")):
        distribution(site, name, version)
    path = project(
        tmp_path,
        *("old>=1.10", "new>=2", "early>=3", "No_Such.Library>=1"),
        *("elsewhere>=1; sys_platform == 'no such system'", "old>=1.2,<2"),
        more='[project.optional-dependencies]\nrun = ["no-such-extra"]\n',
    )
    assert colab.missing(path) == ["old>=1.10", "No_Such.Library>=1"]


def test_the_notebooks_need_their_extra_and_those_that_it_names(tmp_path, site):
    distribution(site, "here", "1.0")
    extras = 'hub = ["no-hub>=1", "here>=1"]\nnotebooks = ["spkit[hub]", "no-torch>=2"]\n'
    more = f'[project.optional-dependencies]\n{extras}run = ["no-such-extra"]\n'
    assert colab.missing(project(tmp_path, "here", more=more)) == ["no-hub>=1", "no-torch>=2"]


def test_what_is_installed_is_what_the_notebooks_import():
    """On Colab everything comes as before: the core alone would not do."""
    wanted = colab._requirements(colab._project(PYPROJECT))
    names = {text.partition(">=")[0] for text in wanted}
    assert {"torch", "transformers", "jupyterlab", "pandas", "bitsandbytes", "zstandard"} <= names
    assert not any("[" in name for name in names) and "snakemake" not in names


def test_torch_is_missing_only_if_there_is_none(tmp_path, site, monkeypatch):
    distribution(site, "torch", "1.0+cu99")
    path = project(tmp_path, "torch>=2.6")
    assert metadata.version("torch") == "1.0+cu99" and colab.missing(path) == []
    monkeypatch.setattr(colab, "_version", lambda name: None)
    assert colab.missing(path) == ["torch>=2.6"]


def test_nothing_missing_calls_nothing(capsys):
    assert colab.install(PYPROJECT, runner=no_runner) == []
    assert capsys.readouterr().out == ""


def test_a_pyproject_that_is_none(tmp_path):
    with pytest.raises(SpkitError, match=r"expected a pyproject.toml with a section \[project\]"):
        colab.missing(tmp_path / "pyproject.toml")
    (tmp_path / "pyproject.toml").write_text("[tool]\n")
    with pytest.raises(SpkitError, match=r"expected a pyproject.toml with a section \[project\]"):
        colab.missing(tmp_path / "pyproject.toml")


# ---- installing ----------------------------------------------------------------------------------


def test_only_the_missing_are_installed_and_torch_is_pinned(tmp_path, site):
    for name in ("torch", "torchvision", "triton", "nvidia_cublas_cu12", "numpy", "torchless"):
        distribution(site, name, "1.2.3+cu99")
    path, pip = project(tmp_path, "torch>=2.6", "numpy>=1", "no-such-library>=1"), Pip()
    assert colab.install(path, runner=pip) == ["no-such-library>=1", "spkit"]
    libraries, ours = pip.commands
    assert libraries[:4] == [sys.executable, "-m", "pip", "install"]
    assert libraries[-1] == "no-such-library>=1" and "torch>=2.6" not in libraries
    assert ours[-3:] == ["--no-deps", "--editable", str(tmp_path)]
    pinned = {f"{x}==1.2.3+cu99" for x in ("torch", "torchvision", "triton", "numpy")}
    # others of the machine that runs this test may be pinned, too
    assert pinned | {"nvidia-cublas-cu12==1.2.3+cu99"} <= set(pip.constraints)
    assert not any(line.startswith("torchless") for line in pip.constraints)
    assert len({line.partition("==")[0] for line in pip.constraints}) == len(pip.constraints)


def test_a_numpy_that_is_too_old_is_not_pinned(tmp_path, site):
    distribution(site, "numpy", "1.26")
    pip = Pip()
    colab.install(project(tmp_path, "numpy>=2"), runner=pip)
    assert pip.commands[0][-1] == "numpy>=2"
    assert not any(line.startswith("numpy") for line in pip.constraints)


def test_spkit_alone_is_installed_without_its_dependencies(tmp_path, monkeypatch):
    monkeypatch.setattr(colab, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pip = Pip()
    assert colab.install(project(tmp_path), runner=pip) == ["spkit"]
    assert [command[-3] for command in pip.commands] == ["--no-deps"]
    assert sys.path[0] == str(tmp_path)  # this Python would not see it before a restart


def test_another_torch_afterwards_is_an_error(tmp_path, site):
    distribution(site, "torch", "2.8.0+cu126")

    def replace():
        (site / "torch-2.8.0+cu126.dist-info").rename(site / "torch-2.9.0.dist-info")
        meta = site / "torch-2.9.0.dist-info" / "METADATA"
        meta.write_text(meta.read_text().replace("2.8.0+cu126", "2.9.0"))

    calls = iter([replace, lambda: None])
    pip = Pip(does=lambda: next(calls)())
    with pytest.raises(SpkitError, match=r"torch was 2.8.0\+cu126 and is 2.9.0 after the install"):
        colab.install(project(tmp_path, "no-such-library"), runner=pip)


def test_a_library_that_is_replaced_while_it_is_loaded_needs_a_restart(tmp_path, site, monkeypatch):
    for name in ("busylibrary", "idlelibrary"):
        distribution(site, name, "1.0")

    def replace():
        for name in ("busylibrary", "idlelibrary"):
            (site / f"{name}-1.0.dist-info").rename(site / f"{name}-2.0.dist-info")
            meta = site / f"{name}-2.0.dist-info" / "METADATA"
            meta.write_text(meta.read_text().replace("1.0", "2.0"))

    monkeypatch.setitem(sys.modules, "busylibrary", SimpleNamespace())
    calls = iter([replace, lambda: None])
    wanted = project(tmp_path, "busylibrary>=2", "idlelibrary>=2")
    with pytest.raises(SpkitError) as error:
        colab.install(wanted, runner=Pip(does=lambda: next(calls)()))
    assert str(error.value).startswith("busylibrary was replaced while the old version is loaded")
    assert "restart the runtime" in str(error.value) and "idle" not in str(error.value)
    assert colab.install(wanted, runner=no_runner) == []  # and after it, nothing is to be done


def test_a_failed_installation_is_one_sentence(tmp_path):
    pip = Pip(code=1, stderr="WARNING: retry\nERROR: No matching distribution found for x\nmore")
    with pytest.raises(SpkitError, match="pip could not install the rest: ERROR: No matching"):
        colab.install(project(tmp_path, "no-such-library"), runner=pip)
    assert len(pip.commands) == 1


# ---- what will fit -------------------------------------------------------------------------------


def machine(gpu_gib, host_gib=1000.0, disk_gib=1000.0, capability=(8, 0)):
    return {
        "python": "3.12.1",
        "torch": "2.8.0+cu126",
        "gpu": gpu_gib and "Some GPU",
        "gpu_memory_gib": gpu_gib,
        "capability": gpu_gib and capability,
        "native_bfloat16": gpu_gib and capability >= (8, 0),
        "host_memory_gib": host_gib,
        "free_disk_gib": disk_gib,
        "colab": True,
    }


def test_a_report_of_this_machine():
    here = colab.runtime()
    assert set(here) == set(machine(None))
    assert here["torch"] == metadata.version("torch") and here["free_disk_gib"] > 0
    assert here["host_memory_gib"] > 1 and here["colab"] is False
    assert colab.report().startswith(f"Python {here['python']}, torch {here['torch']}, ")


def test_without_a_gpu_only_the_sandbox_fits():
    text = colab.report(machine(None))
    assert "no GPU" in text and text.endswith("without a GPU the sandbox only.")


@pytest.mark.parametrize(
    ("gpu_gib", "sizes"),
    [(2, []), (6, ["1B"]), (8, ["1B", "3B"]), (14.7, ["1B", "3B", "7-8B"]), (22, [*colab.SIZES])],
)
def test_what_fits_grows_with_the_gpu(gpu_gib, sizes):
    fitting = colab.fits(machine(gpu_gib))
    assert [size for size, short in fitting.items() if not short] == sizes
    text = colab.report(machine(gpu_gib))
    assert "This is an estimate" in text and "each notebook predicts exactly" in text
    assert (f"likely models of {', '.join(sizes)} in NF4" if sizes else "sandbox only") in text


def test_what_is_too_small_is_named():
    fitting = colab.fits(machine(80, host_gib=7, disk_gib=30))
    assert fitting["1B"] == "" and fitting["3B"] == "host memory"
    assert fitting["13B"] == "host memory and disk"
    assert "13B (too little host memory and disk)" in colab.report(machine(80, 7, 30))


def test_bfloat16_is_native_from_capability_8_on():
    assert "(7.5, no native bfloat16)" in colab.report(machine(15, capability=(7, 5)))
    assert "(8.0, native bfloat16)" in colab.report(machine(15, capability=(8, 0)))


# ---- badges and the script -----------------------------------------------------------------------


def urls(folder, url):
    return project(folder, more=f'[project.urls]\nRepository = "{url}"\n')


@pytest.mark.parametrize("url", ["https://github.com/a/b.c", "https://github.com/a/b.c.git/"])
def test_a_badge_opens_the_notebook_of_the_repository(tmp_path, url):
    link = colab.badge("00_backbone", urls(tmp_path, url))
    assert link == (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        "(https://colab.research.google.com/github/a/b.c/blob/main/notebooks/00_backbone.ipynb)"
    )
    assert colab.badge("00_backbone.ipynb", urls(tmp_path, url)) == link


def test_no_url_no_badge_and_another_host_is_an_error(tmp_path):
    assert colab.badge("00_backbone", project(tmp_path)) is None
    for url in ("https://gitlab.com/a/b", "https://github.com/a", "https://github.com.evil/a/b"):
        with pytest.raises(SpkitError, match="expected: https://github.com/<owner>/<name>"):
            colab.badge("00_backbone", urls(tmp_path, url))


def script(*arguments):
    """The script as it is called, without anything that is installed."""
    command = [sys.executable, "-S", "spkit/running/colab.py", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_script_prints_a_badge_a_notebook_or_that_there_is_no_url():
    ended = script("badges")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.strip().splitlines()
    if colab.badge("00_backbone") is None:
        assert lines[0].startswith("no URL is set") and len(lines) == 1
    else:
        assert lines == [colab.badge(stage) for stage in STAGES]


def test_the_script_needs_no_library_until_versions_are_compared():
    ended = script()
    assert ended.returncode == 1
    assert ended.stderr.startswith("spkit: neither packaging nor pip can be imported")
    ended = script("instal")
    assert ended.stderr.strip() == "spkit: unknown arguments instal, allowed: install, badges"


def test_the_script_says_what_is_missing_and_hides_no_standard_module(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "spkit" / "running"), *sys.path])
    assert colab.main([]).splitlines()[-1] == "missing: nothing"
    # the script's own folder comes first on the path: no module of ours may hide one of Python's
    modules = {path.stem for path in (ROOT / "spkit").rglob("*.py")} - {"__init__", "__main__"}
    assert len(modules) > 90 and not modules & sys.stdlib_module_names
    assert colab.main(["install"]).endswith("installed: nothing, all is there")
