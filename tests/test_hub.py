"""What is pushed to the Hub is whole, loads anywhere, and is told from what was not pushed; over a socket, with faults."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import NO_REPOSITORY
from loopback_hub import READ_TOKEN, TOKEN, Fault, LoopbackHub


REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "someone/amvl"
# trainer/hub.py alone, as it needs nothing but huggingface_hub; nothing is waited for, but noted.
# argv: folder, repository, token; prints a JSON object.
PUSH = """
import json
import sys
import time
from hub import make_repository, push_folder

waits = []
time.sleep = waits.append
folder, repository, token = sys.argv[1:]
try:
    made = make_repository(repository, token)
    said = {"commit": push_folder(folder, made, token).oid}
except (OSError, ValueError) as error:
    said = {"error": str(error), "type": type(error).__name__}
print(json.dumps({**said, "waits": waits}))
"""


def client(hub, folder, script, *arguments, token=None, expect=0, **variables):
    """Runs a process that is logged in only if a `token` is given, and returns the last line that it printed, and all else."""
    environment = {
        key: value for key, value in hub.environment(folder).items() if key not in ("HF_TOKEN", "PYTHONPATH")
    }
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules")} | variables
    folder.mkdir(exist_ok=True)
    command = script if isinstance(script, list) else [sys.executable, "-c", script]
    finished = subprocess.run(
        [*command, *map(str, arguments)], env=environment, cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == expect, finished.stderr + "\n".join(hub.requests)
    return finished


def push(hub, tmp_path, folder, token=TOKEN, repository=NAME):
    finished = client(
        hub, tmp_path / "client", PUSH, folder, repository, token, PYTHONPATH=str(REPOSITORY / "trainer")
    )
    assert_no_token(finished.stdout + finished.stderr, tmp_path, hub)
    return json.loads(finished.stdout.splitlines()[-1])


def assert_no_token(printed, folder, hub):
    """No token stands in what was printed, in any file under a folder, or in any file of any commit on the Hub."""
    written = {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    for id, repository in hub.models.items():
        for sha, files in repository.commits.items():
            written |= {f"{id}@{sha}/{name}": file.data for name, file in files.items()}
    for token in (TOKEN, READ_TOKEN):
        assert token not in printed
        assert [name for name, data in written.items() if token.encode() in data] == []


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    """What a run leaves, without a model that could load."""
    files = {
        "config.json": b'{"model_type": "amvl"}',
        "model.safetensors": os.urandom(300_000),
        "modeling_amvl.py": b"# code\n",
        "README.md": b"---\nlicense: mit\n---\n# A model\n",
    }
    kept_here = {"checkpoint-1/model.safetensors": b"1", "data_report/train/report.html": b"2", "_scratch": b"3"}
    for name, data in (files | kept_here).items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(data)
    return tmp_path / "run"


def pushed(folder):
    return {name: data for name, data in contents(folder).items() if name.startswith(("config", "model", "README"))}


def on_hub(hub, name=NAME):
    return {path: file.data for path, file in hub.models[name].files.items() if path != ".gitattributes"}


# ---------------------------------------------------------------------------------------------------------------------
# A folder, in one commit, or in a message
# ---------------------------------------------------------------------------------------------------------------------

CREATE, CHECK, CARD, COMMIT = "POST /api/repos", "GET .*/auth-check", "POST /api/validate-yaml", "POST .*/commit/"
ASK, BATCH, BLOB, LIST = "POST .*/preupload/", "POST .*/objects/batch", "PUT /lfs/", "GET .*/tree/"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(CREATE, 503, times=2),
        Fault(CREATE, "cut answer", times=1),
        Fault(CHECK, 500, times=2),
        Fault(CARD, 502, times=1),
        Fault(LIST, 500, times=1),
        Fault(ASK, "cut answer", times=1),
        Fault(BATCH, 503, times=2),
        Fault(BLOB, 500, times=3),
        Fault(BLOB, "cut upload", times=2),
        Fault(BLOB, "cut answer", times=1),
        Fault(BLOB, 429, times=1, headers={"Retry-After": "77"}),
        Fault(COMMIT, 503, times=3),
        Fault(COMMIT, "cut upload", times=1),
        Fault(COMMIT, "cut answer", times=1),
        Fault(COMMIT, 429, times=1, headers={"Retry-After": "77"}),
        Fault(COMMIT, 429, times=1, headers={"RateLimit": '"api";r=0;t=77'}),
    ],
    ids=lambda fault: f"{fault.request} {fault.kind} x{fault.times}",
)
def test_a_fault_that_passes_ends_in_one_commit_that_holds_everything(fault, hub, folder, tmp_path):
    before = contents(folder)
    hub.faults = [fault]
    said = push(hub, tmp_path, folder)
    assert fault.times == 0  # it did happen
    assert said.get("commit") == hub.models[NAME].head, said
    assert len(hub.models[NAME].commits) == 2  # the first made the repository
    assert on_hub(hub) == pushed(folder) and contents(folder) == before
    assert len([request for request in hub.requests if request.startswith("POST /api/repos")]) <= 3
    waits = said["waits"]
    assert 1 <= len(waits) <= 3
    assert (78 in waits) is bool(fault.headers)  # as long as the Hub asks for, and one for rounding


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ([Fault(COMMIT, 500)], "500"),
        ([Fault(COMMIT, 400)], "Bad request"),  # rejected, after the weights went up
        ([Fault(COMMIT, 403)], "403"),
        ([Fault(COMMIT, 401)], "401"),
        ([Fault(COMMIT, "cut upload")], "disconnected|reset|closed|terminat|Broken"),
        ([Fault(BLOB, 503)], "503"),
        ([Fault(ASK, 500), Fault(LIST, 500)], "500"),
    ],
    ids=["500", "rejected", "403", "401", "cut", "weights", "all"],
)
def test_a_fault_that_stays_ends_in_a_message_and_the_repository_as_it_was(faults, why, hub, folder, tmp_path):
    assert "commit" in push(hub, tmp_path, folder)  # an earlier version: the same configuration, other weights
    earlier = on_hub(hub)
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "new.py").write_text("# more code\n")
    before = contents(folder)
    hub.faults = faults
    said = push(hub, tmp_path, folder)
    assert said["type"] == "OSError" and re.search(why, said["error"]), said
    assert on_hub(hub) == earlier and len(hub.models[NAME].commits) == 2 and contents(folder) == before
    message = said["error"]
    assert f"`{NAME}`" in message and str(folder) in message
    if faults[-1].request == LIST:
        assert "could not be asked" in message
    else:
        assert "as in the folder: ['README.md', 'config.json', 'modeling_amvl.py']" in message
        assert "not as in the folder: ['model.safetensors']" in message and "Not there: ['new.py']" in message
        assert "without these weights" in message
    assert len(said["waits"]) <= 40
    hub.faults = []
    command = re.search(r"^ +python (-c .*)$", message, re.MULTILINE)[
        1
    ]  # as told, but for where the function is found
    again = [sys.executable, *shlex.split(command.replace("trainer.hub", "hub"))]
    client(hub, tmp_path / "again", again, token=TOKEN, PYTHONPATH=str(REPOSITORY / "trainer"))
    assert on_hub(hub) == {**pushed(folder), "new.py": before["new.py"]}


@pytest.mark.parametrize(
    ("token", "name", "why"),
    [
        (READ_TOKEN, NAME, "403.*may not write"),
        (READ_TOKEN, "someone/new", "403.*may not write"),
        ("hf_unknown", "someone/new", "401"),
        (TOKEN, "some//one", "Repo id"),
    ],
)
def test_a_repository_that_may_not_be_written_to_is_refused_before_anything_is_sent(
    token, name, why, hub, folder, tmp_path
):
    assert "commit" in push(hub, tmp_path, folder)
    num_requests = len(hub.requests)
    said = push(hub, tmp_path, folder, token, name)
    assert said["type"] == "ValueError" and said["waits"] == []
    assert re.search(f"`hub_model_id` is {name!r}, to which nothing can be pushed: .*{why}", said["error"], re.DOTALL)
    assert "hf auth login" in said["error"]
    assert not any("/commit/" in request or "/lfs" in request for request in hub.requests[num_requests:])


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(hub, folder, tmp_path):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (folder / name).write_bytes(b"shard" + name.encode())
    (folder / "adapter_config.json").write_text("{}")
    (folder / "notes.safetensors").write_bytes(b"kept")
    push(hub, tmp_path, folder)
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (folder / name).unlink()
    (folder / "adapter_config.json").unlink()
    (folder / "notes.safetensors").unlink()
    push(hub, tmp_path, folder)
    assert on_hub(hub) == {**pushed(folder), "notes.safetensors": b"kept"}
    assert len(hub.models[NAME].commits) == 3


@pytest.mark.parametrize(
    ("head", "left"),
    [
        ("---\ntags:\n- amvl\nlicense: Apache 2.0\ndatasets:\n- /disk/me\n---\n", "---\ntags:\n- amvl\n---\n"),
        ("---\nlicense: Apache 2.0\n---\n", ""),
        ("---\nlicense: [\n---\n", ""),
        ("---\n- a\n---\n", ""),
    ],
    ids=["some", "only", "no YAML", "no mapping"],
)
def test_a_card_that_the_hub_refuses_does_not_keep_the_weights_from_it(head, left, hub, folder, tmp_path):
    (folder / "README.md").write_text(f"{head}# A model\n\n---\nlicense: mine\n---\n")
    before = contents(folder)
    said = push(hub, tmp_path, folder)
    assert said.get("commit") == hub.models[NAME].head, said
    text = on_hub(hub)["README.md"].decode()
    assert text == f"{left}# A model\n\n---\nlicense: mine\n---\n"
    assert {**on_hub(hub), "README.md": b""} == {**pushed(folder), "README.md": b""} and contents(folder) == before
    assert (
        len([request for request in hub.requests if request == "POST /api/validate-yaml"]) == 2
    )  # it was refused once


def test_a_folder_without_weights_is_refused_and_leaves_the_repository_its_own(hub, folder, tmp_path):
    push(hub, tmp_path, folder)
    (folder / "model.safetensors").unlink()
    for bad in (folder, tmp_path / "misspelt"):
        said = push(hub, tmp_path, bad)
        assert said["type"] == "ValueError" and f"`folder` ({bad}) has no weights" in said["error"]
    assert len(hub.models[NAME].commits) == 2 and "model.safetensors" in on_hub(hub)


# ---------------------------------------------------------------------------------------------------------------------
# A model: by the trainer, by hand, by the recipe; and loaded by a stranger
# ---------------------------------------------------------------------------------------------------------------------

ASK = """
import json
import sys
from PIL import Image


def answer(model, processor, photo):
    content = [{"type": "image", "image": Image.open(photo)}, {"type": "text", "text": "What color is the circle?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()  # 5 tokens, as was set
"""

# argv: a folder, a token; prints what each repository should answer, by id and commit, and what else happened.
TRAIN = """
import os
import pickle
import re
import shlex
from pathlib import Path
import torch
from tiny import build_tiny_backbone
from trl import ModelConfig, SFTConfig
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from recipes import sft_amvl
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.data.color_steps import build_color_steps

root, token = Path(sys.argv[1]), sys.argv[2]
photo, rows = root / "photo.png", build_color_steps(4, image_size=48)
rows[0]["images"][0].save(photo)
backbone, processor = build_tiny_backbone()
backbone.generation_config.eos_token_id, backbone.generation_config.max_new_tokens = None, 5
backbone.save_pretrained(root / "stock")
processor.save_pretrained(root / "stock")
rows.save_to_disk(root / "rows")
settings = {
    "push_to_hub": True, "hub_token": token, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01,
    "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "training_summary": False, "gradient_checkpointing": False,
    "self_test": False,
}
processor = AMVLProcessor.from_backbone(processor)
model = AMVLForConditionalGeneration.from_backbone(
    backbone, num_latents=3, latent_size=8, latent_token_id=processor.latent_token_id
)
args = AMVLSFTConfig(
    str(root / "run"), hub_model_id="someone/run", hub_strategy="checkpoint", save_strategy="steps", save_steps=1, **settings
)
trainer = AMVLSFTTrainer(model, args, train_dataset=rows, processing_class=processor)
trainer.train()
model.generation_config.eos_token_id = None  # the trainer has set it
expected = [["someone/run", trainer.push_to_hub().oid, answer(trainer.model.eval(), processor, photo)]]
with torch.no_grad():
    for parameter in trainer.model.backbone.lm_head.parameters():
        parameter.copy_(-parameter)
expected.append(["someone/run", None, answer(trainer.model, processor, photo)])
trainer.push_to_hub(blocking=False).result()
trainer.model.push_to_hub("someone/hand", token=token)
processor.push_to_hub("someone/hand", token=token)
expected.append(["someone/hand", None, expected[-1][2]])
try:
    trainer.model.push_to_hub("someone/rejected", token=token)
except Exception as error:
    by_hand = type(error).__name__

args = AMVLSFTConfig(str(root / "lora"), hub_model_id="someone/lora", save_strategy="no", **settings)
arguments = sft_amvl.AMVLScriptArguments(dataset_name=str(root / "rows"), num_latents=3, latent_size=8)
lora = ModelConfig(str(root / "stock"), use_peft=True, lora_target_modules=["q_proj", "v_proj"])
try:
    sft_amvl.main(arguments, args, lora)
except OSError as error:
    message = str(error)
os.environ["HF_TOKEN"] = token  # logged in, as the message asks for
exec(shlex.split(re.search(r"python -c (.*)$", message, re.MULTILINE)[1])[0])
merged = AMVLForConditionalGeneration.from_pretrained(root / "lora" / "merged")
expected.append(["someone/lora", None, answer(merged, processor, photo)])
leaks = token.encode() in pickle.dumps(SFTConfig(str(root / "x"), hub_token=token, use_cpu=True, bf16=False))
print(repr(trainer.args), trainer.args, args.to_json_string())
print(json.dumps({"expected": expected, "message": message, "by_hand": by_hand, "leaks": leaks}))
"""

# argv: a JSON list of [Hub id, revision, ...], a photo; prints a JSON list of answers and what a missing model says.
LOAD = """
from transformers import AutoModelForImageTextToText, AutoProcessor

answers = []
for name, revision, _ in json.loads(sys.argv[1]):
    settings = {"trust_remote_code": True, "revision": revision or "main"}
    model = AutoModelForImageTextToText.from_pretrained(name, **settings)
    processor = AutoProcessor.from_pretrained(name, **settings)
    assert type(model).__module__.startswith("transformers_modules.") and model.config.num_latents == 3
    assert type(processor).__module__.startswith("transformers_modules.")
    answers.append(answer(model, processor, sys.argv[2]))
errors = []
for auto in (AutoModelForImageTextToText, AutoProcessor):
    try:
        auto.from_pretrained("someone/missing", trust_remote_code=True)
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
print(json.dumps([answers, errors]))
"""
LOADS = {"config.json", "generation_config.json", "model.safetensors", "modeling_amvl.py", "processing_amvl.py"}
LOADS |= {"tokenizer.json", "processor_config.json", "chat_template.jinja", "README.md"}


@pytest.mark.slow
def test_what_is_pushed_loads_at_a_commit_in_a_fresh_process_and_offline_and_no_token_is_written(hub, tmp_path):
    names = "run", "rejected", "lora"
    rejected = [Fault(f"POST /api/models/someone/{name}/commit", 400, times=1) for name in names]
    hub.faults = list(rejected)
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    train = client(hub, tmp_path / "train", ASK + TRAIN, tmp_path, TOKEN, PYTHONPATH=path)
    said = json.loads(train.stdout.splitlines()[-1])
    assert [fault.times for fault in rejected] == [0, 0, 0]
    assert "A push while training failed" in train.stderr and "could not be pushed to `someone/run`" in train.stderr

    # Whichever commit one looks at, it is no model, or a whole one.
    for name in ("run", "lora"):
        versions = [files for files in hub.models[f"someone/{name}"].commits.values() if "config.json" in files]
        assert versions and all(files.keys() >= LOADS for files in versions)
        assert b"AutoModelForImageTextToText" in versions[-1]["README.md"].data
    run, hand, lora = (on_hub(hub, f"someone/{name}") for name in ("run", "hand", "lora"))
    assert run.keys() > {"training_args.bin", *(f"last-checkpoint/{name}" for name in (*LOADS, "optimizer.pt"))}
    assert hand.keys() >= LOADS
    assert lora == contents(tmp_path / "lora" / "merged")  # and no adapter, which would be loaded instead
    assert str(tmp_path).encode() not in lora["README.md"]
    assert said["by_hand"] == "BadRequestError" and on_hub(hub, "someone/rejected") == {}

    # A stranger, with an empty cache, also where answers are cut off and lost; then offline.
    hub.faults = [Fault("HEAD .*/config.json", 503, times=1), Fault("GET .*/model.safetensors", "cut answer", times=1)]
    arguments = json.dumps(said["expected"]), tmp_path / "photo.png"
    answers = [answer for _, _, answer in said["expected"]]
    assert answers[0] != answers[1] and [len(answer[0]) for answer in answers[:3]] == [5] * 3
    script, stranger = NO_REPOSITORY + ASK + LOAD, tmp_path / "stranger"
    online = json.loads(client(hub, stranger, script, *arguments).stdout.splitlines()[-1])
    assert [fault.times for fault in hub.faults] == [0, 0] and online[0] == answers
    hub.faults = [Fault(".*", 500)]
    num_requests = len(hub.requests)
    without = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(stranger / "none_yet")}
    offline = json.loads(client(hub, stranger, script, *arguments, **without).stdout.splitlines()[-1])
    assert offline[0] == answers and len(hub.requests) == num_requests
    for errors, what_to_do in ((online[1], "someone/missing.*`hf auth login`"), (offline[1], "cached files.*offline")):
        assert len(errors) == 2 and all(re.search(what_to_do, error, re.DOTALL) for error in errors), errors

    assert said["leaks"]  # as transformers writes it, so that what follows is no matter of course
    assert_no_token(train.stdout + train.stderr, tmp_path, hub)
