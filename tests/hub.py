"""A small Hugging Face hub on 127.0.0.1, which huggingface_hub takes for the real one through HF_ENDPOINT.

It serves the repositories that a test gives it: what the hub keeps outside git (weights, archives, tables) by way of a
second server, as the hub's own redirects do. It remembers every request, and fails where it is told to. Run by itself,
it serves a folder of zero-shot tasks' documents to whoever HF_ENDPOINT sends:

    python tests/hub.py FOLDER  # of arc_easy.jsonl and others, in the fields of the hub's data sets; prints its address
"""

import hashlib
import io
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow
from pyarrow import parquet

OUTSIDE_GIT = (".bin", ".safetensors", ".model", ".parquet", ".gz")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/(refs/convert/parquet|[^/]+)/(.+)")
IN_THE_BODY = ("half", "stall")
INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/datasets/([^/]+/[^/]+)/(tree|paths-info)/([^/]+)(?:/(.*))?")

# task -> data set, its configuration and the split that the stock definition evaluates
TASKS = {
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "rte": ("nyu-mll/glue", "rte", "validation"),
    "hellaswag": ("Rowan/hellaswag", "default", "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "piqa": ("baber/piqa", "default", "validation"),
}


@dataclass(frozen=True)
class Request:
    """What was asked of which server ("hub" or "cdn"), and whether with a token."""

    server: str
    method: str
    path: str
    token: str


@dataclass
class Failure:
    """`how` is a status, "cut" (no answer), "hang" (nothing at all), "page" (a page of HTML), "half" (half of the body,
    then cut) or "stall" (half of it, then nothing); for the first `times` requests whose path has `path`.
    """

    path: str
    how: int | str
    times: float
    headers: dict[str, str]


@dataclass
class Repository:
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # revision -> name -> contents
    gated: bool = False
    private: bool = False


class Hub:
    """The server, running while it is entered: `with Hub() as hub`. Its one good token is "hf_good"."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.moved: dict[str, str] = {}  # a model's former name -> its name, to which the hub redirects
        self.closing = threading.Event()
        self._servers = {name: _Server(("127.0.0.1", 0), self, name) for name in ("hub", "cdn")}

    def __enter__(self):
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers['hub'].server_port}"

    @property
    def cdn(self) -> str:
        """The second server, under another host's name."""
        return f"http://localhost:{self._servers['cdn'].server_port}"

    def add(self, name: str, files: dict[str, bytes | str], kind: str = "models", revision: str = "main", **access):
        """A repository, or one more revision of it. `gated` and `private` close it to all but the good token."""
        made = self.repositories.setdefault(f"{kind}/{name}", Repository(**access))
        made.files[revision] = {file: text.encode() if isinstance(text, str) else text for file, text in files.items()}

    def add_tasks(self, documents: dict[str, list[dict]]):
        """The data sets of these tasks as the hub lays them out: a parquet file for each configuration's split."""
        made: dict[str, dict[str, dict[str, list[dict]]]] = {}
        for task, rows in documents.items():
            name, configuration, split = TASKS[task]
            splits = dict.fromkeys(("train", "validation", "test"), rows[:1]) | {split: rows}
            made.setdefault(name, {})[configuration] = splits
        for name, configurations in made.items():
            files, card = {}, ["---", "configs:"]
            for configuration, splits in configurations.items():
                card += [f"- config_name: {configuration}", "  data_files:"]
                for split, rows in splits.items():
                    path = f"{configuration}/{split}-00000-of-00001.parquet"
                    card += [f"  - split: {split}", f"    path: {configuration}/{split}-*"]
                    file = io.BytesIO()
                    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
                    files[path] = file.getvalue()
            self.add(name, {"README.md": "\n".join([*card, "---", ""]), **files}, "datasets")

    def fail(self, path: str, how: int | str, times: float = float("inf"), **headers: str):
        self.failures.append(Failure(path, how, times, headers))

    def asked(self, part: str = "", method: str = "") -> list[str]:
        """The paths that were asked for, of those that have `part`."""
        return [r.path for r in self.requests if part in r.path and method in r.method]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: Hub, name: str):
        super().__init__(address, _Handler)
        self.hub, self.name = hub, name


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        hub.requests.append(Request(self.server.name, self.command, path, token))
        if failure := self._failure(path, lambda how: how not in IN_THE_BODY):
            self._fail(failure)
        elif self.server.name == "cdn":
            repository, branch, file = path[1:].split("@")
            self._send(200, hub.repositories[repository].files[branch][file])
        elif former := next((n for n in hub.moved if path.startswith((f"/api/models/{n}", f"/{n}/resolve/"))), None):
            self._send(307, b"", {"Location": path.replace(former, hub.moved[former], 1)})
        elif found := INFO.fullmatch(path):
            self._info(*found.groups()[:2], token)
        elif found := TREE.fullmatch(path):
            self._tree(*found.groups(), token)
        elif found := RESOLVE.fullmatch(path):
            self._resolve("datasets" if found[1] else "models", *found.groups()[1:], token)
        else:
            self._refuse(404, "", "no such page")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.do_GET()

    def _failure(self, path: str, kind: Callable[[int | str], bool]) -> Failure | None:
        for failure in self.server.hub.failures:
            if failure.path in path and failure.times > 0 and kind(failure.how):
                failure.times -= 1
                return failure
        return None

    def _fail(self, failure: Failure):
        if failure.how == "hang":
            self.server.hub.closing.wait()
            self.close_connection = True
        elif failure.how == "cut":
            self._cut()
        elif failure.how == "page":
            self._send(200, b"<html>Log in to this network</html>", {"Content-Type": "text/html"})
        else:
            self._send(failure.how, b"", failure.headers)

    def _cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _info(self, kind: str, name: str, token: str):
        if (repository := self._allowed(kind, name, token)) is None:
            return
        files = [{"rfilename": file} for file in repository.files["main"]]
        said = {"id": name, "sha": _commit(name, "main"), "siblings": files, "private": repository.private}
        self._send(200, json.dumps(said).encode())

    def _tree(self, name: str, what: str, _revision: str, folder: str | None, token: str):
        """The files of a data set in a folder and below, or at the paths that were sent."""
        if (repository := self._allowed("datasets", name, token)) is None:
            return
        files = repository.files["main"]
        if what == "paths-info":
            sent = (
                json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
            )
            chosen = [file for file in files if file in sent]
            folders = [path for path in sent if any(file.startswith(f"{path}/") for file in files)]
        else:
            chosen = [file for file in files if not folder or file.startswith(f"{folder}/")]
            folders = sorted({str(PurePosixPath(file).parent) for file in chosen if "/" in file})
            if not chosen:
                return self._refuse(404, "EntryNotFound", f"{folder} does not exist")
        said = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        for file in chosen:
            size, digest = len(files[file]), _etag(files[file]).strip('"')
            entry = {"type": "file", "oid": digest[:40], "size": size, "path": file}
            stored = {"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if file.endswith(OUTSIDE_GIT) else {}
            said.append(entry | stored)
        return self._send(200, json.dumps(said).encode())

    def _resolve(self, kind: str, name: str, revision: str, file: str, token: str):
        if (repository := self._allowed(kind, name, token)) is None:
            return
        by_commit = {_commit(name, branch): branch for branch in repository.files}
        branch = by_commit.get(revision, revision)
        if branch not in repository.files:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repository.gated and token != "hf_good":
            why = "you are not in the authorized list" if token else "You must have access to it and be authenticated"
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to {name} is restricted and {why}.")
        headers = {"X-Repo-Commit": _commit(name, branch)}
        if file not in repository.files[branch]:
            return self._refuse(404, "EntryNotFound", "Entry not found", headers)
        contents = repository.files[branch][file]
        if not file.endswith(OUTSIDE_GIT):
            return self._send(200, contents, headers)
        headers |= {"X-Linked-Size": str(len(contents)), "X-Linked-ETag": _etag(contents)}
        location = f"{self.server.hub.cdn}/{kind}/{name}@{branch}@{file}"
        return self._send(302, b"", headers | {"Location": location, "ETag": _etag(contents)})

    def _allowed(self, kind: str, name: str, token: str) -> Repository | None:
        repository = self.server.hub.repositories.get(f"{kind}/{name}")
        if token and not token.startswith("hf_"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and token != "hf_good"):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        else:
            return repository
        return None

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        whole, first = len(body), int(self.headers.get("range", "bytes=0-")[len("bytes=") : -1])
        if first and status == 200:
            status, body = 206, body[first:]
            headers = {**(headers or {}), "Content-Range": f"bytes {first}-{whole - 1}/{whole}"}
        self.send_response(status)
        for key, value in {"ETag": _etag(body), **(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        failure = self._failure(unquote(self.path), lambda how: how in IN_THE_BODY) if len(body) > 1 else None
        self.wfile.write(body[: len(body) // 2] if failure else body)
        self.wfile.flush()
        if failure and failure.how == "stall":
            self.server.hub.closing.wait()
        if failure:
            self._cut()


def _commit(name: str, branch: str) -> str:
    return hashlib.sha1(f"{name}@{branch}".encode()).hexdigest()


def _etag(contents: bytes) -> str:
    return f'"{hashlib.sha256(contents).hexdigest()}"'


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    read = {
        task: [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        for task in TASKS
        if (folder / f"{task}.jsonl").is_file()
    }
    with Hub() as serving:
        serving.add_tasks(read)
        print(serving.url, flush=True)
        threading.Event().wait()
