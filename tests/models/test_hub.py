"""A directory stays what it is; an id is fetched without pickles, or found in the cache."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from rayapp.cli import app
from rayapp.errors import ModelError
from rayapp.models import hub as hub_module
from rayapp.models.hub import ModelLocation, from_directory, locate
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import PruningPlan

OLD, NEW = "a" * 40, "b" * 40
FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b"[]",
    "tokenizer.model": b"sp",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/tool.jinja": b"{{ y }}",
    "preprocessor_config.json": b"{ }",
    "LICENSE": b"terms",
}
NOT_FETCHED = {
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"pickle",
    "model.pt": b"pickle",
    "modeling_own.py": b"import os",
    "README.md": b"# card",
    "consolidated.safetensors": b"again",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"again",
    ".gitattributes": b"x",
    "tf_model.h5": b"h5",
}


@pytest.mark.parametrize(
    "model", ["./modle", "modle", "/no/where/at/all", "a/b/c", "~/modle", "a//b"]
)
def test_a_wrong_path_is_a_wrong_path(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such model directory; give one with config\.json"):
        locate(model)


def test_a_directory_is_used_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = locate("owner/name")
    assert found == ModelLocation(Path("owner/name"))
    assert found.name == "name"
    assert found.pinned == str(tmp_path / "owner" / "name")
    assert found.provenance == {}
    assert locate(found.pinned).directory == tmp_path / "owner" / "name"
    with pytest.raises(ModelError, match="is a directory, which has no revision 'v1'"):
        locate("owner/name", "v1")
    (tmp_path / "owner" / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file, no model directory"):
        locate(tmp_path / "owner" / "file")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as the Hub's own library lays it out; the tests' environment is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    repo = tmp_path / "hub" / "models--owner--name"
    for commit in (OLD, NEW):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    (repo / "refs" / "v1").write_text(OLD)
    return repo


@pytest.mark.parametrize(
    ("model", "revision", "commit"),
    [
        ("owner/name", None, NEW),
        ("owner/name", "main", NEW),
        ("owner/name", "v1", OLD),
        ("owner/name@v1", None, OLD),
        (f"owner/name@{OLD}", None, OLD),
        ("owner/name", OLD, OLD),
    ],
)
def test_offline_the_cache_is_used(cache, model, revision, commit):
    found = locate(model, revision)
    assert found == ModelLocation(cache / "snapshots" / commit, "owner/name", commit)
    assert found.name == "owner/name"
    assert found.pinned == f"owner/name@{commit}"
    assert found.provenance == {"model": {"id": "owner/name", "revision": commit}}
    assert locate(found.pinned) == found
    # The path of a snapshot says as much.
    assert locate(found.directory) == from_directory(found.directory) == found


@pytest.mark.parametrize(
    ("model", "revision"), [("owner/other", None), ("owner/name", "v2"), ("owner/name", "c" * 40)]
)
def test_offline_a_miss_is_one_clear_line(cache, model, revision):
    started = time.monotonic()
    with pytest.raises(
        ModelError, match=f"{model}: no such directory.*HF_HUB_OFFLINE is set"
    ) as no:
        locate(model, revision)
    assert time.monotonic() - started < 5
    assert "\n" not in str(no.value)
    assert f"`hf download {model}" in str(no.value)
    assert str(cache.parent) in str(no.value)
    assert no.value.__cause__ is None


def test_what_is_no_id_or_no_revision(cache):
    for revision in ("../../x", "/etc/passwd", "-x", "a b", "a\nb"):
        with pytest.raises(ModelError, match="is no revision"):
            locate("owner/name", revision)
    with pytest.raises(ModelError, match="--revision main another"):
        locate("owner/name@v1", "main")
    for name in ("owner/na--me", "own er/name", "owner/..", "owner/name.git", "../name"):
        with pytest.raises(ModelError, match="no such model directory"):
            locate(name)


def test_a_snapshot_of_links_is_a_model_as_any(cache, save_tiny, tmp_path):
    path = save_tiny(tmp_path, "llama")
    snapshot, blobs = cache / "snapshots" / NEW, cache / "blobs"
    blobs.mkdir()
    (snapshot / "config.json").unlink()
    for file in path.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    found = locate("owner/name")
    assert load_model(found.directory).signature == read_signature(path)
    # A search writes into its plan what it was given.
    lines = [{"prompt": "ab" * (6 + n), "completion": "cd"} for n in range(3)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {
        "model": found.directory, "calibration": tmp_path / "lines.jsonl",
        "out": tmp_path / "out", "decode-remove": 1, "method": "random", "evaluations": 3,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    run = CliRunner().invoke(app, ["prune", *words])
    assert run.exit_code == 0, run.output
    plan = PruningPlan.load(tmp_path / "out")
    assert plan.provenance["model"] == {"id": "owner/name", "revision": NEW}


class StubHub(ThreadingHTTPServer):
    """Answers for one public model as the Hub does; counts what is asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files = {**FILES, **NOT_FETCHED}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubHub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(f"{self.command} {path}")
        content, headers, status = self._answer(path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _answer(self, path):
        known = ("main", "v1", OLD, NEW)
        if path.startswith("/api/models/gated/"):
            return b"{}", {"X-Error-Code": "GatedRepo"}, 403
        if not path.startswith(("/api/models/owner/name", "/owner/name/")):
            return b"{}", {"X-Error-Code": "RepoNotFound"}, 404
        if path.startswith("/api/models/owner/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in self.server.files.items()
            ]
            return json.dumps(tree).encode(), {"Content-Type": "application/json"}, 200
        if path.startswith("/api/models/"):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in known:
                return b"{}", {"X-Error-Code": "RevisionNotFound"}, 404
            commit = {"main": NEW, "v1": OLD}.get(revision, revision)
            siblings = [{"rfilename": name} for name in self.server.files]
            info = {"id": "owner/name", "sha": commit, "siblings": siblings}
            return json.dumps(info).encode(), {"Content-Type": "application/json"}, 200
        commit, _, name = path.removeprefix("/owner/name/resolve/").partition("/")
        content = self.server.files[name]
        return content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}, 200

    def log_message(self, *_):
        pass


def _etag(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub():
    with StubHub() as server:
        yield server
        server.shutdown()


@pytest.fixture
def online(tmp_path, monkeypatch):
    """``online(url)``: the Hub's library asks there, with a cache of its own."""

    def point(url="http://127.0.0.1:9"):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        for name, value in {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + template,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return point


def names(directory):
    return {str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file()}


def test_what_is_fetched(hub, online, tmp_path, monkeypatch):
    online(hub.url)
    found = locate("owner/name")
    assert found.pinned == f"owner/name@{NEW}"
    assert names(found.directory) == FILES.keys()
    assert all((found.directory / name).read_bytes() == FILES[name] for name in FILES)
    touched = {name for name in NOT_FETCHED if any(each.endswith(f"/{name}") for each in hub.asked)}
    assert not touched
    blobs = {file.read_bytes() for file in tmp_path.rglob("blobs/*")}
    assert not blobs & {b"pickle", b"import os", b"again"}
    # Again without a network: by its branch, and pinned.
    online()
    assert locate("owner/name") == locate(found.pinned) == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("owner/name") == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("owner/name", "v9"), "revision 'v9' is not on the Hub, though the model is"),
        (("owner/nothing",), "is not on the Hub, or private"),
        (("gated/model",), "is gated; accept its terms"),
    ],
)
def test_what_the_hub_refuses(hub, online, arguments, said):
    online(hub.url)
    assert locate("owner/name", "v1").revision == OLD
    with pytest.raises(ModelError) as refused:
        locate(*arguments)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_snapshot_that_is_not_whole_is_refused_offline(hub, online):
    online(hub.url)
    found = locate("owner/name")
    (found.directory / "model-00002-of-00002.safetensors").unlink()
    online()
    with pytest.raises(ModelError, match="not whole"):
        locate("owner/name")
    online(hub.url)
    locate("owner/name")
    assert names(found.directory) == FILES.keys()


def test_without_a_network_a_miss_is_quick(online):
    online()
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"the Hub cannot be reached \(ConnectError.*`hf download"):
        locate("owner/name")
    assert time.monotonic() - started < 5


def test_a_network_that_never_answers_is_given_up(online, monkeypatch):
    monkeypatch.setattr(hub_module, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ModelError, match="cannot be reached"):
            locate("owner/name")
        assert time.monotonic() - started < 5


def test_it_needs_no_torch():
    code = "import sys, rayapp.models.hub; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
