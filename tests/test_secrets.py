"""Tokens come from the environment or the hub's own login, and no file ever holds one.

tests/running/test_notebooks.py holds that a walkthrough writes none; here are failures, in which
libraries print what they know, and parameters.
"""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import nbformat
import pytest
import yaml

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.running.notebook import start

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "params" / "micro.yaml"
SECRETS = {
    "HF_TOKEN": "hf_FailingRunsTokenForTheTests987654",
    "WANDB_API_KEY": "wandb0failing0runs0key0for0the0tests0123",
}
TOKEN = SECRETS["HF_TOKEN"]


def holding(folder):
    """(file, name of the secret) of every file below the folder that holds one."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    assert paths
    return [
        (path.name, name)
        for path in paths
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes() or secret in path.name
    ]


def notebook_00(folder, source, **environment):
    """Notebook 00, as `spkit run` executes it, on a backbone that is not there; all that it leaves
    is in folder."""
    executed, log = folder / "executed.ipynb", folder / "log.txt"
    command = [
        sys.executable,
        "-m",
        "spkit.running.execute",
        "notebooks/00_backbone.ipynb",
        str(executed),
    ]
    command += ["-k", "python3", "--no-progress-bar", "--log-output", "-f", str(MICRO)]
    command += ["-p", "outputs", str(folder / "outputs")]
    command += ["-y", f"overrides: {{backbone.source: {source}}}"]
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_ENDPOINT")}
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=clean
        | SECRETS
        | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hub"), "HF_DEBUG": "1"}
        | environment,
        capture_output=True,
        text=True,
    )
    log.write_text(ended.stdout + ended.stderr)
    cells = nbformat.read(executed, as_version=4).cells
    errors = [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"]
    return SimpleNamespace(code=ended.returncode, errors=errors, log=log.read_text())


@pytest.fixture
def hub():
    """A hub on this machine that answers every request with 401 and keeps what it was sent."""

    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self):
            heard.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.send_header("X-Error-Message", "Invalid username or password.")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    heard = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", heard=heard)
    server.shutdown()
    server.server_close()


def check_failed(ended, folder):
    assert ended.code == 1 and [error.ename for error in ended.errors] == ["SpkitError"]
    assert "nobody/no-such-backbone" in ended.errors[0].evalue and "SpkitError" in ended.log
    assert not (folder / "outputs").exists()  # refused before anything is begun
    assert holding(folder) == []


def test_a_backbone_that_is_refused_tells_no_secret(tmp_path, hub):
    ended = notebook_00(tmp_path, "nobody/no-such-backbone", HF_ENDPOINT=hub.url)
    check_failed(ended, tmp_path)
    assert f"Bearer {TOKEN}" in hub.heard  # it was really used, and for nothing else
    assert not any(SECRETS["WANDB_API_KEY"] in str(header) for header in hub.heard)


def test_a_backbone_that_is_not_there_offline_tells_no_secret(tmp_path):
    check_failed(notebook_00(tmp_path, "nobody/no-such-backbone", HF_HUB_OFFLINE="1"), tmp_path)


def test_a_secret_in_a_file_would_be_found(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log.txt").write_text(f"authorization: Bearer {TOKEN}")
    assert holding(tmp_path) == [("log.txt", "HF_TOKEN")]


# ---- a token among the parameters ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"backbone": {"revision": TOKEN}}, "backbone.revision"),
        ({"backbone": {"source": f"https://user:{TOKEN}@hub/a"}}, "backbone.source"),
        ({"backbone": {"token": TOKEN}}, "backbone.token"),  # before "unknown key ... (value ...)"
        ({"run_name": TOKEN}, "run_name"),
        ({"data": {"categories": ["a", TOKEN]}}, "data.categories"),
        ({"data": {"sources": {TOKEN: {}}}}, "data.sources, a name in it,"),
        ({TOKEN: 1}, "a name"),
    ],
)
def test_a_token_is_no_parameter(values, key):
    with pytest.raises(SpkitError) as error:
        Config.from_sources(values)
    assert str(error.value).startswith(f"{key} looks like a Hugging Face token, which is never")
    assert "set the environment variable HF_TOKEN" in str(error.value)
    assert TOKEN not in str(error.value)


def test_nor_is_it_in_overrides_or_a_file(tmp_path):
    with pytest.raises(SpkitError, match="^overrides.backbone.revision looks like") as error:
        Config.from_sources({}, {"backbone.revision": TOKEN})
    assert TOKEN not in str(error.value)
    for overrides in ({"backbone.revision": TOKEN}, TOKEN):
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump({"overrides": overrides}))
        with pytest.raises(SpkitError, match="params.yaml: overrides.* looks like") as error:
            load_params(path)
        assert TOKEN not in str(error.value)


def test_nor_is_it_a_name_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpkitError, match="^token looks like") as error:
        start("00_backbone", {"token": TOKEN})
    assert TOKEN not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["hf_internal_testing", "hf_" + "a" * 19, "xhf_" + "a" * 20])
def test_names_that_are_no_tokens_pass(name):
    assert Config.from_sources({"backbone": {"source": name}}).backbone.source == name
