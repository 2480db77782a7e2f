"""A Hugging Face Hub on the loopback interface, in memory: enough to create, push to, list and load repositories.

huggingface_hub reads its endpoint at import and speaks through sockets of its own, so clients are subprocesses:

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "-c", "..."], env=hub.environment(tmp_path / "hf_home"), check=True)
        assert hub.models["user/name"].files["model.safetensors"].lfs

What goes wrong is data: requests that match are answered with an error, or cut off, so many times:

    hub.faults = [Fault("PUT /lfs/", 503, times=2), Fault("POST .*/commit/", "cut answer", times=1)]

Written against huggingface_hub 2.4. Writing asks for the token, reading does not. One branch, `main`; commits can be
read by their hash. No pull requests, no gated or private repositories, no Xet.
"""

import base64
import hashlib
import json
import math
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "may-write-and-is-written-nowhere"
READ_TOKEN = "may-read-and-is-written-nowhere"
USER = "loopback"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".zip", ".npz", ".png", ".jpg")  # as in .gitattributes
REPOSITORY = r"(?P<id>[^/]+/[^/]+)"
KIND = r"/api/(?P<kind>models|datasets|spaces)/" + REPOSITORY
PREFIX = r"/(?P<kind>datasets/|spaces/)?"  # of files and of large uploads


@dataclass(frozen=True)
class File:
    """One version of a file; `lfs` tells how it was uploaded."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Repository:
    """A linear history: `commits` maps a commit's hash to the files it holds, oldest first."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def commit(self, files: dict[str, File]) -> str:
        listing = "".join(f"{path} {file.blob_id}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, File]:
        return self.commits[self.head]


@dataclass
class Fault:
    """What goes wrong with some requests.

    Attributes:
        request (`str`): Regular expression that the beginning of "METHOD /path" must match.
        kind (`int` or `str`): A status, answered without doing anything; `"cut upload"`: half of the body is read, nothing
            is done, and the connection closed; `"cut answer"`: all is done, and the connection closed halfway through
            the answer.
        times (`float`): How many requests are left that it happens to; for ever by default.
        headers (`dict[str, str]`): Of the answer.
    """

    request: str
    kind: int | str
    times: float = math.inf
    headers: dict[str, str] = field(default_factory=dict)


ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
LICENSES = [
    "apache-2.0",
    "mit",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc0-1.0",
    "gemma",
    "llama3.2",
    "other",
    "unknown",
]  # some
TYPES = {
    "tags": list,
    "license": str,
    "library_name": str,
    "pipeline_tag": str,
    "model-index": list,
    "language": (str, list),
}
RELATIONS = ("adapter", "merge", "quantized", "finetune", "newversion")


def metadata_errors(content: str) -> list[str]:
    """What is wrong with the metadata of a card: the part of the Hub's rules that this project's cards come into touch with."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data or {}, dict):
        return ["the metadata is no mapping"]
    data = data or {}
    wrong = [
        f'"{key}" must be of another type'
        for key, kind in TYPES.items()
        if key in data and not isinstance(data[key], kind)
    ]
    if wrong:
        return wrong
    for key in ("datasets", "base_model"):
        values = data.get(key, [])
        for id in values if isinstance(values, list) else [values]:
            if not isinstance(id, str) or not ID.fullmatch(id):
                wrong.append(f'"{key}" with value {id} is not valid')
    if data.get("license", "other") not in LICENSES:
        wrong.append(f'"license" must be one of {LICENSES}')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        wrong.append(f'"base_model_relation" must be one of {RELATIONS}')
    wrong += [f'"tags" has {tag!r}, which is no text' for tag in data.get("tags", []) if not isinstance(tag, str)]
    for model in data.get("model-index", []):
        results = model.get("results") if isinstance(model, dict) and isinstance(model.get("name"), str) else None
        if not isinstance(results, list):
            wrong.append('"model-index" needs a name and results')
            continue
        for result in results:
            task, dataset, metrics = (result.get(key) or {} for key in ("task", "dataset", "metrics"))
            needed = [
                task.get("type"),
                dataset.get("type"),
                dataset.get("name"),
                *(metric.get("type") for metric in metrics),
            ]
            if not metrics or not all(isinstance(text, str) and text for text in needed):
                wrong.append('"model-index" needs task.type, dataset.type, dataset.name and metrics.type')
            wrong += ['"model-index" needs metrics.value' for metric in metrics if metric.get("value") is None]
            source = result.get("source")
            if source is not None and not str(source.get("url", "")).startswith("http"):
                wrong.append('"model-index" has a source without a url')
    return wrong


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class LoopbackHub:
    """Context manager that serves on a free port of 127.0.0.1 and forgets everything at exit.

    Attributes:
        endpoint (`str`): What clients need as `HF_ENDPOINT`; `environment` gives all that they need.
        models, datasets, spaces (`dict[str, Repository]`): The repositories by id, to look into from a test.
        requests (`list[str]`): "METHOD /path" of each request, in order of arrival.
        faults (`list[Fault]`): What goes wrong, the first that matches; empty at first.
    """

    def __init__(self):
        self.models: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.spaces: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "LoopbackHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, hf_home: str | os.PathLike) -> dict[str, str]:
        """Returns the environment of a client process whose caches lie under `hf_home`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.endswith("_OFFLINE")}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(Path(hf_home).absolute()),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def next_fault(self, request: str) -> Fault | None:
        """Notes a request and returns what goes wrong with it."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.match(fault.request, request):
                    fault.times -= 1
                    return fault
        return None

    def repository(self, kind: str | None, id: str) -> Repository:
        kind = (kind or "models").rstrip("/")
        repositories = getattr(self, kind)
        if id not in repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repositories[id]

    def snapshot(self, kind: str | None, id: str, revision: str | None = None) -> tuple[str, dict[str, File]]:
        repository = self.repository(kind, id)
        sha = repository.head if revision in (None, "main") else revision
        if sha not in repository.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]


class _Handler(BaseHTTPRequestHandler):
    """Methods named in `ROUTES` answer (status, headers, body); `body` is bytes or something that JSON can write."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def whoami(self, body):
        return 200, {}, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body):
        request = json.loads(body)
        id = f"{request.get('organization') or USER}/{request['name']}"
        kind = f"{request.get('type') or 'model'}s"
        if kind == "spaces" and request.get("sdk") not in ("gradio", "docker", "static"):
            raise HubError(400, "BadRequest", f"Invalid sdk: {request.get('sdk')}")
        repositories = getattr(self.hub, kind)
        status = 409 if id in repositories else 200
        if status == 200:
            repositories[id] = Repository()
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            repositories[id].commit({".gitattributes": File(attributes.encode(), lfs=False)})
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{id}"
        return status, {}, {"url": url, "id": id, "name": id}

    def auth_check(self, body, kind, id):
        self.hub.repository(kind, id)
        self.check_token()
        return 200, {}, {}

    def validate_yaml(self, body):
        errors = metadata_errors(json.loads(body)["content"])
        return (400 if errors else 200), {}, {"errors": [{"message": error} for error in errors], "warnings": []}

    def preupload(self, body, kind, id, revision):
        _, present = self.hub.snapshot(kind, id, revision)
        files = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = present[path].oid if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {}, {"files": files}

    def lfs_batch(self, body, id, kind=None):
        self.hub.repository(kind, id)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(body)["objects"]]
        for entry in objects:
            if entry["oid"] not in self.hub.lfs_objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
        return 200, {}, {"transfer": "basic", "objects": objects}

    def lfs_put(self, body, sha256):
        if hashlib.sha256(body).hexdigest() != sha256:
            raise HubError(400, "BadRequest", "The content does not have the announced sha256")
        self.hub.lfs_objects[sha256] = body
        return 200, {}, b""

    def commit(self, body, kind, id, revision):
        files = dict(self.hub.snapshot(kind, id, revision)[1])
        for line in body.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = File(self.hub.lfs_objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            elif key != "header":
                raise HubError(400, "BadRequest", f"Unknown operation {key}")
        sha = self.hub.repository(kind, id).commit(files)
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{id}/commit/{sha}"
        return 200, {}, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}

    def info(self, body, kind, id, revision=None):
        sha, files = self.hub.snapshot(kind, id, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return 200, {}, {"_id": id, "id": id, "sha": sha, "private": False, "tags": [], "siblings": siblings}

    def tree(self, body, kind, id, revision, folder=None):
        _, files = self.hub.snapshot(kind, id, revision)
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        entries = {}
        for path, file in sorted(inside.items()):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                above = prefix + "/".join(parts[:depth])
                entries[above] = {"type": "directory", "path": above, "oid": hashlib.sha1(above.encode()).hexdigest()}
            entries[path] = self.entry(path, file)
        if "recursive=true" not in self.path.lower():
            entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(prefix)}
        return 200, {}, list(entries.values())

    def entry(self, path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.data)}
        return entry | ({"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}} if file.lfs else {})

    def resolve(self, body, id, revision, path, kind=None):
        sha, files = self.hub.snapshot(kind, id, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        file, status = files[path], 200
        data = file.data
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.blob_id}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(data))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            if first >= len(data):
                return 416, headers | {"Content-Range": f"bytes */{len(data)}"}, b""
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        return status, headers | {"Content-Type": "application/octet-stream"}, data

    ROUTES = [
        ("GET", r"/api/whoami-v2", whoami),
        ("POST", r"/api/repos/create", create),
        ("GET", KIND + r"/auth-check/write", auth_check),
        ("POST", r"/api/validate-yaml", validate_yaml),
        ("POST", KIND + r"/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", KIND + r"/commit/(?P<revision>[^/]+)", commit),
        ("POST", PREFIX + REPOSITORY + r"\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", lfs_put),
        ("GET", KIND + r"(/revision/(?P<revision>[^/]+))?", info),
        ("GET", KIND + r"/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", tree),
        ("GET", PREFIX + REPOSITORY + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ]

    def do_GET(self):
        path = urlsplit(self.path).path
        fault = self.hub.next_fault(f"{self.command} {path}")
        if fault and fault.kind == "cut upload":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.hang_up()
        body = self.read_body()  # also when it is refused: an unread body would spoil the next request
        if fault and fault.kind != "cut answer":
            status, headers, answer = (
                fault.kind,
                fault.headers,
                f"<html>{fault.kind}</html>".encode(),
            )  # as gateways say it
        else:
            status, headers, answer = self.answer(path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        is_cut = fault and fault.kind == "cut answer"
        if is_cut and (self.command == "HEAD" or not data):
            return self.hang_up()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers | {"Content-Length": len(data)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        if is_cut:
            self.hang_up()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, path: str, body: bytes):
        method = "GET" if self.command == "HEAD" else self.command
        try:
            with self.hub.lock:
                if method != "GET" and "/lfs/" not in path:
                    self.check_token()
                return self.route(method, path)(body)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            return error.status, headers, {"error": str(error)}

    def check_token(self):
        given = self.headers.get("Authorization")
        if given == f"Bearer {READ_TOKEN}":
            raise HubError(403, "Forbidden", "This token may not write")
        if given != f"Bearer {TOKEN}":
            raise HubError(401, "Unauthorized", "Invalid username or password.")

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def route(self, method: str, path: str):
        for route_method, pattern, answer in self.ROUTES:
            if method == route_method and (match := re.fullmatch(pattern, path)):
                parameters = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                return lambda body: answer(self, body, **parameters)
        raise HubError(404, "NotImplemented", f"The loopback hub does not serve {method} {path}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format, *args):
        pass
