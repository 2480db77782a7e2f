"""A stock model and its tokenizer travel through the loopback hub from one process to another."""

import http.client
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from loopback_hub import READ_TOKEN, TOKEN, Fault, LoopbackHub


PUSH = """
import sys
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes))
words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
torch.save(model.state_dict(), sys.argv[1])
model.push_to_hub("someone/tiny")
tokenizer.push_to_hub("someone/tiny")
"""

PULL = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pushed = torch.load(sys.argv[1])
pulled = AutoModelForCausalLM.from_pretrained("someone/tiny").state_dict()
assert pulled.keys() == pushed.keys() and len(pulled) > 0, (pulled.keys(), pushed.keys())
for name, tensor in pushed.items():
    assert torch.equal(tensor, pulled[name]), name
print(AutoTokenizer.from_pretrained("someone/tiny").convert_tokens_to_ids(["b", "a"]))
"""

HUB_CALLS = """
import io
import pathlib
import sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError


def refused(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error:
        return
    raise SystemExit(f"{call.__name__}{args} did not raise {error.__name__}")


api = HfApi()
refused(RepositoryNotFoundError, api.model_info, "someone/nothing")
refused(RepositoryNotFoundError, hf_hub_download, "someone/nothing", "config.json")
for repo_type in ("model", "dataset"):
    repo = {"repo_id": "someone/notes", "repo_type": repo_type}
    api.create_repo(**repo)
    api.create_repo(**repo, exist_ok=True)
    first = api.upload_file(**repo, path_in_repo="deep/note.txt", path_or_fileobj=io.BytesIO(b"one")).oid
    api.upload_file(**repo, path_in_repo="deep/note.txt", path_or_fileobj=io.BytesIO(b"two"))
    api.upload_file(**repo, path_in_repo="deep/table.bin", path_or_fileobj=io.BytesIO(bytes(range(256))))
    api.upload_file(**repo, path_in_repo="README.md", path_or_fileobj=io.BytesIO(b"---\\nlicense: mit\\n---\\n"))
    refused(EntryNotFoundError, hf_hub_download, **repo, filename="deep/absent.txt")
    refused(RevisionNotFoundError, hf_hub_download, **repo, filename="README.md", revision="absent")
    folder = pathlib.Path(snapshot_download(**repo))
    assert (folder / "deep/note.txt").read_bytes() == b"two"
    assert (folder / "deep/table.bin").read_bytes() == bytes(range(256))
    assert pathlib.Path(hf_hub_download(**repo, filename="deep/note.txt", revision=first)).read_bytes() == b"one"
    assert api.file_exists(**repo, filename="README.md") and not api.file_exists(**repo, filename="absent.md")
    names = {entry.path for entry in api.list_repo_tree(**repo, recursive=True)}
    assert names == {".gitattributes", "README.md", "deep", "deep/note.txt", "deep/table.bin"}, names
    api.delete_file(**repo, path_in_repo="deep/note.txt")
    assert "deep/note.txt" not in api.list_repo_files(**repo)
print("all calls answered")
"""


def run_client(hub: LoopbackHub, hf_home: Path, script: str, *arguments: object) -> str:
    """Runs a script in a process of its own, from an empty folder, and returns what it printed."""
    hf_home.mkdir()
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(command, env=hub.environment(hf_home), cwd=hf_home, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr + "\n".join(hub.requests)
    return finished.stdout


def test_a_pushed_model_loads_in_another_process_with_the_same_weights(tmp_path):
    with LoopbackHub() as hub:
        run_client(hub, tmp_path / "pusher", PUSH, tmp_path / "weights.pt")
        files = hub.models["someone/tiny"].files
        assert files["model.safetensors"].lfs and not files["config.json"].lfs and not files["tokenizer.json"].lfs
        assert f"PUT /lfs/{files['model.safetensors'].sha256}" in hub.requests

        pushed = len(hub.requests)
        printed = run_client(hub, tmp_path / "puller", PULL, tmp_path / "weights.pt")
        assert json.loads(printed) == [1, 0]
        downloads = [request for request in hub.requests[pushed:] if request.startswith("GET /someone/tiny/resolve/")]
        assert any(request.endswith("/model.safetensors") for request in downloads)  # nothing came from a cache


def test_the_hub_client_can_create_upload_list_download_and_delete(tmp_path):
    with LoopbackHub() as hub:
        assert run_client(hub, tmp_path / "client", HUB_CALLS).strip() == "all calls answered"


def ask(hub: LoopbackHub, method: str, path: str, body: dict | None = None, **headers: str):
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(
        urllib.request.Request(hub.endpoint + path, data=data, method=method, headers=headers), timeout=10
    )


def test_ranges_and_sizes_are_those_of_the_file():
    with LoopbackHub() as hub:
        ask(
            hub, "POST", "/api/repos/create", {"name": "x", "organization": "y"}, Authorization=f"Bearer {TOKEN}"
        ).close()
        whole = ask(hub, "GET", "/y/x/resolve/main/.gitattributes")
        text = whole.read()
        part = ask(hub, "GET", "/y/x/resolve/main/.gitattributes", Range="bytes=2-6")
        assert (part.status, part.read()) == (206, text[2:7])
        assert part.headers["Content-Range"] == f"bytes 2-6/{len(text)}"
        head = ask(hub, "HEAD", "/y/x/resolve/main/.gitattributes")
        assert (head.read(), int(head.headers["Content-Length"])) == (b"", len(text))
        assert head.headers["X-Repo-Commit"] == hub.models["y/x"].head


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/repos/create", {"name": "x", "organization": "y"}, 401),  # no token
        ("GET", "/api/models/y/x", None, 404),
        ("GET", "/api/unheard-of", None, 404),
    ],
)
def test_the_hub_refuses(method, path, body, status):
    with LoopbackHub() as hub, pytest.raises(urllib.error.HTTPError) as refusal:
        ask(hub, method, path, body)
    with refusal.value as answer:
        assert answer.status == status and answer.headers["X-Error-Code"]


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong when it is told to
# ---------------------------------------------------------------------------------------------------------------------

CREATE = {"name": "x", "organization": "y"}


def create(hub):
    return ask(hub, "POST", "/api/repos/create", CREATE, Authorization=f"Bearer {TOKEN}")


def test_a_status_is_answered_so_many_times_and_nothing_is_done():
    with LoopbackHub() as hub:
        hub.faults = [Fault("POST /api/repos", 429, times=2, headers={"Retry-After": "7"}), Fault("GET", 503)]
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                create(hub)
            with refusal.value as answer:
                assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
        assert hub.models == {}
        create(hub).close()
        assert list(hub.models) == ["y/x"]
        for _ in range(9):
            with pytest.raises(urllib.error.HTTPError, match="503"):
                ask(hub, "GET", "/api/models/y/x")


@pytest.mark.parametrize(("kind", "is_done"), [("cut upload", False), ("cut answer", True)])
def test_a_connection_is_cut_before_or_after_what_was_asked_is_done(kind, is_done):
    with LoopbackHub() as hub:
        hub.faults = [Fault("POST /api/repos", kind, times=1)]
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            create(hub).read()
        assert ("y/x" in hub.models) is is_done


def test_an_answer_is_cut_in_its_middle():
    with LoopbackHub() as hub:
        create(hub).close()
        whole = ask(hub, "GET", "/y/x/resolve/main/.gitattributes").read()
        hub.faults = [Fault(".*gitattributes", "cut answer", times=1)]
        with pytest.raises(http.client.IncompleteRead) as cut:
            ask(hub, "GET", "/y/x/resolve/main/.gitattributes").read()
        assert cut.value.partial == whole[: len(whole) // 2] != b""


@pytest.mark.parametrize(("token", "status"), [(READ_TOKEN, 403), ("hf_unknown", 401)])
def test_a_token_without_rights_is_refused(token, status):
    with LoopbackHub() as hub:
        create(hub).close()
        ask(hub, "GET", "/api/models/y/x/auth-check/write", Authorization=f"Bearer {TOKEN}").close()
        for method, path, body in (
            ("POST", "/api/repos/create", CREATE),
            ("GET", "/api/models/y/x/auth-check/write", None),
            ("POST", "/api/models/y/x/commit/main", {}),
        ):
            with pytest.raises(urllib.error.HTTPError, match=str(status)):
                ask(hub, method, path, body, Authorization=f"Bearer {token}")
