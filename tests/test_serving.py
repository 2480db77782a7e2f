"""The server, as clients meet it: the real command on a real socket, asked by the stock `openai` client."""

import base64
import contextlib
import io
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from PIL import Image
from tiny import build_tiny_backbone
from transformers import LlavaForConditionalGeneration
from transformers.cli.serving.model_manager import ModelManager

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from modeling_amvl.generation_amvl import LatentDecodingMixin
from trainer.base import add_latents
from trainer.data.color_steps import build_color_steps
from trainer.serving import build_app, requests, serve
from trainer.serving.server import AMVLModelManager


pytestmark = pytest.mark.xdist_group("serving")  # one worker makes what all of them share
REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "amvl-demo"
LENGTH = 12  # tokens of an answer; the model never ends one by itself
QUESTION = "List colors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded base with latents, its prior moved as training would move it; it talks on for ever."""
    folder = tmp_path_factory.mktemp("serving") / NAME
    torch.manual_seed(0)
    model, processor = add_latents(2, 64)
    with torch.no_grad():
        weight = model.prior_head.mean.weight
        weight += 0.5 * weight.std() * torch.randn_like(weight)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def amvl(folder):
    return AMVLForConditionalGeneration.from_pretrained(folder).eval(), AMVLProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def images():
    return [row["images"][0] for row in build_color_steps(8)]


@pytest.fixture(scope="module")
def server(folder):
    """Address and first lines of the command, which SIGTERM ends with a clean word."""
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(REPOSITORY / "recipes" / "serve_amvl.py"), str(folder)]
    command += ["--port", "0", "--device", "cpu", "--max_request_mib", "1"]
    log = folder.with_name("log")
    with open(log, "w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        start = log.read_text()
        while "Application startup complete" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[0], start
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert "Finished server process" in log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def data_url(data, form="png"):
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def ask_about(*images, text=QUESTION):
    parts = [image_part(data_url(encoded(image))) for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(client, messages, stream=False, **settings):
    """What the client reads, and why it ended."""
    answer = client.chat.completions.create(
        model=NAME, messages=messages, stream=stream, **({"max_tokens": LENGTH} | settings)
    )
    if not stream:
        return answer.choices[0].message.content, answer.choices[0].finish_reason
    chunks = [chunk.choices[0] for chunk in answer]
    return "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason


def generated(amvl, turns, seed=None, **settings):
    """What `generate` answers to chat turns of the processor's own form."""
    model, processor = amvl
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    if seed is not None:
        torch.manual_seed(seed)
    ids = model.generate(**inputs, **({"max_new_tokens": LENGTH} | settings))[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


def user(*images, text=QUESTION):
    return {
        "role": "user",
        "content": [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_that_of_generate(client, amvl, images, stream):
    answer, reason = ask(client, ask_about(images[0]), stream)
    assert answer == generated(amvl, [user(images[0])]) and len(answer.split()) > 3
    assert reason == "length"


def test_the_example_of_the_recipe(server, amvl, images, tmp_path, monkeypatch, capsys):
    docstring = (REPOSITORY / "recipes" / "serve_amvl.py").read_text(encoding="utf-8").split('"""')[1]
    code = textwrap.dedent(docstring[docstring.index("    import base64") : docstring.index("`temperature`")])
    for shown, there in (("http://127.0.0.1:8000", server[0]), ("stream=True", f"stream=True, max_tokens={LENGTH}")):
        assert shown in code
        code = code.replace(shown, there)
    monkeypatch.chdir(tmp_path)
    images[0].save("photo.png")
    exec(code, {})
    assert capsys.readouterr().out == generated(amvl, [user(images[0], text="2 steps from red?")])


def test_a_jpeg_is_read_as_jpeg(client, amvl, images):
    data = encoded(images[1], "JPEG")
    messages = [{"role": "user", "content": [image_part(data_url(data, "jpeg")), {"type": "text", "text": QUESTION}]}]
    assert ask(client, messages)[0] == generated(amvl, [user(Image.open(io.BytesIO(data)))])


@pytest.mark.parametrize("stream", [False, True])
def test_several_turns_and_images(client, amvl, images, stream):
    messages = ask_about(images[0], images[1])
    first = client.chat.completions.create(model=NAME, messages=messages, max_tokens=3).choices[0].message
    # As its users do: the answer goes back as it came, nulls and all.
    messages += [first.model_dump(), *ask_about(images[2], text="Where is red ?")]
    expected = generated(amvl, [user(*images[:2]), assistant(first.content), user(images[2], text="Where is red ?")])
    assert ask(client, messages, stream)[0] == expected


def test_a_question_without_an_image(client, amvl):
    assert ask(client, [{"role": "user", "content": QUESTION}])[0] == generated(amvl, [user()])


@pytest.mark.parametrize("stream", [False, True])
def test_a_seed_draws_what_it_draws_here(client, amvl, images, stream):
    sampling = {"temperature": 1.5, "top_p": 0.95}
    answers = {}
    for seed in (1, 2):
        answers[seed], _ = ask(client, ask_about(images[0]), stream, seed=seed, **sampling)
        assert answers[seed] == generated(amvl, [user(images[0])], seed, do_sample=True, **sampling)
    assert answers[1] != answers[2]


def test_a_request_has_its_own_temperature_of_the_latents(client, amvl, images):
    answers = set()
    for temperature, seed in ((0.0, 0), (30.0, 0), (30.0, 1), (30.0, 2), (30.0, 3)):
        settings = {"extra_body": {"latent_temperature": temperature}, "seed": seed}
        answer, _ = ask(client, ask_about(images[0]), **settings)
        assert answer == generated(amvl, [user(images[0])], seed, latent_temperature=temperature)
        answers.add(answer)
    assert len(answers) >= 3  # seeds too, of which some say the same


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer(client, images, stream):
    whole, _ = ask(client, ask_about(images[0]))
    word = whole.split()[2]
    answer, reason = ask(client, ask_about(images[0]), stream, stop=word)
    assert whole.startswith(answer) and answer.endswith(word) and len(answer) < len(whole) and reason == "stop"


def test_an_answer_without_a_length_fills_the_window_and_no_more(client, amvl, images):
    answer = client.chat.completions.create(model=NAME, messages=ask_about(images[0]))
    window = amvl[0].config.get_text_config().max_position_embeddings
    assert answer.usage.total_tokens + amvl[0].config.num_latents == window
    assert answer.choices[0].finish_reason == "length"


def test_texts_that_look_like_tokens_stay_texts(client, amvl, images):
    plain = client.chat.completions.create(model=NAME, messages=ask_about(images[0]), max_tokens=1).usage.prompt_tokens
    text = f"{QUESTION} <image> <latent> <|end|>"
    marked = client.chat.completions.create(model=NAME, messages=ask_about(images[0], text=text), max_tokens=1)
    processor = amvl[1]
    inputs = processor.apply_chat_template(
        [user(images[0], text=text)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        sanitize_control_tokens=True,
    )
    (ids,) = inputs["input_ids"]
    assert marked.usage.prompt_tokens == len(ids) > plain
    assert processor.latent_token_id not in ids


def test_eight_clients_at_once_get_what_each_gets_alone(server, amvl, images):
    """Streamed and not, greedy and with seeds, latents at several temperatures."""
    settings = [
        {"stream": index % 2 == 0, "seed": index}
        | ({"temperature": 1.5} if index % 4 < 2 else {})
        | ({"extra_body": {"latent_temperature": 30.0}} if index % 3 == 0 else {})
        for index in range(8)
    ]
    expected = [
        generated(
            amvl,
            [user(image)],
            asked["seed"],
            latent_temperature=asked.get("extra_body", {}).get("latent_temperature"),
            **({"do_sample": True, "temperature": 1.5} if "temperature" in asked else {}),
        )
        for image, asked in zip(images, settings)
    ]
    assert len(set(expected)) == 8
    together = threading.Barrier(8)

    def one(index):
        with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120) as client:
            together.wait()
            return [ask(client, ask_about(images[index]), **settings[index])[0] for _ in range(3)]

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(one, range(8)))
    assert answers == [[answer] * 3 for answer in expected]


def test_clients_that_hang_up_leave_the_others_alone(client, amvl, images):
    expected = generated(amvl, [user(images[0])])
    for _ in range(3):
        stream = client.chat.completions.create(model=NAME, messages=ask_about(images[1]), stream=True, max_tokens=900)
        next(iter(stream))
        stream.close()
    impatient = client.with_options(timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        ask(impatient, ask_about(images[1]), max_tokens=900)
    assert ask(client, ask_about(images[0]))[0] == ask(client, ask_about(images[0]), stream=True)[0] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Bad requests
# ---------------------------------------------------------------------------------------------------------------------

RED = data_url(encoded(Image.new("RGB", (72, 72), "red")))
SECRET = encoded(Image.new("RGB", (72, 72), "blue"))


def about(url):
    return {"messages": [{"role": "user", "content": [image_part(url), {"type": "text", "text": "?"}]}]}


def big_png():
    """A picture of 100 megapixels in few bytes."""
    return encoded(Image.new("1", (10_000, 10_000)))


BAD = {
    "no messages": ({"messages": []}, r"`messages`"),
    "messages that are a text": ({"messages": "hello"}, r"`messages`.*'hello'"),
    "a message without content": ({"messages": [{"role": "user"}]}, r"`messages.0.content` is missing"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, r"`messages.0.role`.*'tool'"),
    "a model's name without end": ({"model": "x" * 10**5}, r"`model`.*at most 256 characters"),
    "another model": ({"model": "gpt-4"}, r"'amvl-demo'.*'gpt-4'"),
    "broken base64": (about("data:image/png;base64,@@@@"), r"`messages.0.content.0.image_url.url`.*base64 is broken"),
    "no image": (about(data_url(b"no image at all")), r"cannot be read"),
    "half an image": (about(data_url(SECRET[: len(SECRET) // 2])), r"damaged or cut short|cannot be read"),
    "an empty image": (about("data:image/png;base64,"), r"cannot be read"),
    "an image of too many pixels": (about(data_url(big_png())), r"more than 33554432 pixels together"),
    "too many images": (
        {"messages": [{"role": "user", "content": about(RED)["messages"][0]["content"][:1] * 33}]},
        r"33 images together, at most 32",
    ),
    "too many messages": ({"messages": about(RED)["messages"] * 257}, r"257, at most 256"),
    "too many parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 65}]},
        r"`messages.0.content` has 65 parts, at most 64",
    ),
    "a text of megabytes": ({"messages": [{"role": "user", "content": "a" * 2**19}]}, r"524288 characters together"),
    "an address": (about("http://127.0.0.1:1/x.png"), r"opens no address and no file"),
    "a file's address": (about("file:///etc/hostname"), r"opens no address and no file"),
    "a part of another kind": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        r"`messages.0.content.0`.*'input_audio'",
    ),
    "too long a text": (
        {"messages": [{"role": "user", "content": "red " * 2000}]},
        r"2\d\d\d tokens.*2 latents.*1024",
    ),
    "too long an answer": ({"max_tokens": 1020}, r"1020 of an answer \(`max_tokens`\).*1024"),
    "no answer": ({"max_tokens": 0}, r"`max_tokens`.*0"),
    "a length that is a text": ({"max_tokens": "12"}, r"`max_tokens`.*'12'"),
    "a negative temperature": ({"temperature": -0.5}, r"`temperature`.*-0.5"),
    "a temperature that is nearly 0": ({"temperature": 1e-40}, r"`temperature`.*too small to divide by"),
    "a latent temperature that overflows": (
        {"extra_body": {"latent_temperature": 1e308}},
        r"`latent_temperature`.*1e\+308",
    ),
    "`top_p` of a greedy answer": ({"top_p": 0.5}, r"`top_p` is 0.5, but nothing is sampled"),
    "a seed that is no number": ({"seed": "x"}, r"`seed`.*'x'"),
    "a seed beyond torch's": ({"seed": 2**64}, r"`seed`"),
    "five stops": ({"stop": list("abcde")}, r"`stop`.*at most 4"),
    "an empty stop": ({"stop": ""}, r"`stop.0`"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, r"`tools`"),
    "log-probabilities": ({"logprobs": True}, r"`logprobs`.*True"),
    "two answers": ({"n": 2}, r"`n`.*2"),
    "audio": ({"modalities": ["text", "audio"]}, r"`modalities` is not supported"),
    "json": ({"response_format": {"type": "json_object"}}, r"`response_format.type`"),
    "continuous batching": ({"extra_body": {"continuous_batching": True}}, r"`continuous_batching` is not supported"),
    "settings of generate": ({"extra_body": {"generation_config": "{}"}}, r"`generation_config` is not supported"),
    "a template": ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, r"`chat_template_kwargs` is not"),
    "a latent temperature below 0": ({"extra_body": {"latent_temperature": -1}}, r"`latent_temperature`.*-1"),
    "a latent temperature that is none": (
        {"extra_body": {"latent_temperature": "hot"}},
        r"`latent_temperature`.*'hot'",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_a_sentence(client, name, stream):
    settings, sentence = BAD[name]
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**({"model": NAME, "stream": stream, "max_tokens": 1} | about(RED) | settings))
    assert 400 <= raised.value.status_code < 500
    assert re.search(sentence, raised.value.body["message"]), raised.value.body
    assert len(raised.value.body["message"]) < 600 and "Traceback" not in raised.value.body["message"]


HALVES = {"model": {"model": "\ud800"}, "text": {"messages": [{"role": "user", "content": "\ud800 hi"}]}}


@pytest.mark.parametrize("body", HALVES.values(), ids=HALVES)
def test_half_a_character_is_refused(server, body):
    """JSON can hold it, though no client's library sends it."""
    whole = json.dumps({"model": NAME, "max_tokens": 1} | about(RED) | body).encode()
    asked = urllib.request.Request(f"{server[0]}/v1/chat/completions", whole, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(asked, timeout=60)
    assert raised.value.code == 400
    assert "half of a character" in json.loads(raised.value.read())["error"]["message"]


MANY = dict.fromkeys(map(str, range(1000)), 1)
UNKNOWN = {
    "the request": (MANY, "`0` is not"),
    "a message": ({"messages": [{"role": "user", "content": "x"} | MANY]}, "`messages.0`: `0` is not"),
    "a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"} | MANY]}]},
        "`messages.0.content.0`: `0` is not",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": RED} | MANY}]}]},
        "`messages.0.content.0.image_url`: `0` is not",
    ),
    "a name without end": ({"x" * 10**6: 1}, f"`{'x' * 256}` is not"),
    "half a character": ({"\ud800": 1}, "`?` is not"),
}


@pytest.mark.parametrize("body", UNKNOWN.values(), ids=UNKNOWN)
def test_of_many_unknown_fields_the_first_is_told_and_no_error_made_of_the_others(body):
    fields, sentence = body
    with pytest.raises(ValueError) as raised:
        requests.read_request({"model": NAME} | about(RED) | fields)
    assert str(raised.value) == f"{sentence} supported by this server: leave it out."
    assert raised.value.__cause__.error_count() == 1


def test_no_stop_is_no_stop():
    assert requests.read_request({"model": NAME, "stop": [], **about(RED)}).stop is None


def test_many_images_are_bounded_together(monkeypatch):
    monkeypatch.setattr(requests, "MAX_PIXELS", 2 * 72 * 72)
    for number in (1, 2):
        asked = about(RED)["messages"] * number
        assert len(requests.read_request({"model": NAME, "messages": asked}).messages) == number
    with pytest.raises(ValueError, match=r"`messages.2.content.0.image_url.url`.*more than 10368 pixels together"):
        requests.read_request({"model": NAME, "messages": about(RED)["messages"] * 3})


def test_no_file_of_the_server_is_read(client, tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(SECRET)
    for url in (str(path), path.as_uri()):
        with pytest.raises(openai.BadRequestError, match="opens no address and no file"):
            client.chat.completions.create(model=NAME, **about(url))


def test_no_address_is_fetched(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(openai.BadRequestError, match="opens no address and no file"):
            client.chat.completions.create(model=NAME, **about(f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def fetch(address, data=None):
    """Status and JSON of a plain request."""
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize("body", ["{", "[]", '"x"', "null", "", "[" * 100_000, '{"model": "amvl-demo"}'])
def test_a_body_that_is_no_request(server, body):
    status, answer = fetch(f"{server[0]}/v1/chat/completions", body.encode())
    assert 400 <= status < 500 and len(answer["error"]["message"]) > 10


def test_a_body_that_is_too_long(client, images):
    with pytest.raises(openai.APIStatusError, match="longer than 1048576 bytes") as raised:
        ask(client, ask_about(images[0], text="red " * 2**19))
    assert raised.value.status_code == 413


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/v1/completions", "/docs", "/"])
def test_other_routes_are_not_there(server, path):
    status, answer = fetch(f"{server[0]}{path}", b'{"model": "x"}')
    assert status == 404 and "POST /v1/chat/completions" in answer["error"]["message"]


# ---------------------------------------------------------------------------------------------------------------------
# The latents are on, or it does not serve
# ---------------------------------------------------------------------------------------------------------------------


def test_it_says_at_its_start_that_the_latents_are_on(server):
    start = server[1]
    assert "`AMVLForConditionalGeneration` around `LlavaForConditionalGeneration`" in start
    assert "Latents are on: k = 2, d = 64, temperature 0.0" in start


def test_a_route_proves_it(server, client):
    assert fetch(f"{server[0]}/health") == (200, {"status": "ok"})
    status, health = fetch(f"{server[0]}/health/latents")
    assert status == 200 and health["latents"] == "on"
    assert (health["num_decoded"], health["num_latents"], health["latent_size"]) == (2, 2, 64)
    changes = health["log_prob_change"]
    assert changes["same_latents"] < 1e-3 < 0.1 < min(changes["other_latents"], changes["no_latents"])
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="`amvl-demo` is served"):
        client.models.retrieve("gpt-4")


@contextlib.contextmanager
def running(folder, latent_temperature=None):
    """Address and model of a server in this process, so that the model can be broken."""
    manager = AMVLModelManager(str(folder), device="cpu")
    app, _ = build_app(manager, latent_temperature)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", manager.load_model_and_processor(NAME)[0]
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture
def here(folder):
    with running(folder) as served:
        yield served


def test_the_server_has_a_temperature_of_the_latents(folder, amvl, images):
    with running(folder, latent_temperature=30.0) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        for own in (None, 0.0):
            expected = {} if own == 0.0 else {"latent_temperature": 30.0}
            answer, _ = ask(client, ask_about(images[0]), seed=0, extra_body={"latent_temperature": own})
            assert answer == generated(amvl, [user(images[0])], 0, **expected)
            assert answer != generated(
                amvl, [user(images[0])], 0, **({} if expected else {"latent_temperature": 30.0})
            )
        assert fetch(f"{address}/health/latents")[1]["latent_temperature"] == 30.0


def test_the_proof_fails_where_the_latents_say_nothing(here):
    address, model = here
    assert fetch(f"{address}/health/latents")[0] == 200
    with torch.no_grad():
        model.latent_projection.weight.zero_()
    status, health = fetch(f"{address}/health/latents")
    assert status == 503 and health["latents"] == "off"
    assert health["log_prob_change"]["other_latents"] == 0.0 < health["log_prob_change"]["no_latents"]


def test_the_proof_fails_where_the_latents_are_skipped(here, monkeypatch):
    address, _ = here

    def stock(self, *arguments, **settings):
        return super(LatentDecodingMixin, self)._prefill(*arguments, **settings)

    monkeypatch.setattr(LatentDecodingMixin, "_prefill", stock)
    status, health = fetch(f"{address}/health/latents")
    assert status == 503 and health["latents"] == "off" and "No latent reached the decoder" in health["reason"]


def test_an_answer_that_nobody_reads_is_given_up(here, images, monkeypatch):
    address, model = here
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    generate, ends = model.generate, queue.Queue()

    def noting(**settings):
        try:
            generate(**settings)
        except Exception as error:
            ends.put(type(error).__name__)
            raise
        ends.put("finished")

    monkeypatch.setattr(model, "generate", noting)
    stream = client.chat.completions.create(model=NAME, messages=ask_about(images[0]), stream=True, max_tokens=900)
    next(iter(stream))
    stream.close()
    assert ends.get(timeout=60) == "_GenerationCancelled"


def test_health_answers_while_a_request_is_read(here, images, monkeypatch):
    address, _ = here
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    reading, answered = threading.Event(), threading.Event()

    def slowly(body):
        reading.set()
        assert answered.wait(30), "/health waits for the request"
        return requests.read_request(body)

    monkeypatch.setattr("trainer.serving.server.read_request", slowly)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask, client, ask_about(images[0]))
        assert reading.wait(30)
        assert fetch(f"{address}/health") == (200, {"status": "ok"})
        answered.set()
        assert asked.result(60)[1] == "length"


def test_a_failing_model_is_a_sentence_and_not_a_stack_trace(here, images, monkeypatch):
    address, model = here
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)

    def fail(**settings):
        raise RuntimeError('out of "memory"\n at line 7')

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client, ask_about(images[0]))
    assert raised.value.body["message"] == "The server failed with a `RuntimeError`, its log says more."
    _, stream = (
        None,
        client.chat.completions.with_raw_response.create(model=NAME, messages=ask_about(images[0]), stream=True),
    )
    lines = [line for line in stream.http_response.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1].removeprefix("data: ")) == {"error": 'The server failed: out of "memory"\n at line 7'}
    monkeypatch.undo()
    assert ask(client, ask_about(images[0]))[1] == "length"


def test_latents_that_say_nothing_are_not_served(folder, tmp_path):
    model = AMVLForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.latent_projection.weight.zero_()
    model.save_pretrained(tmp_path)
    AMVLProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="answers alike whatever its latents are"):
        serve(str(tmp_path), port=0, device="cpu")


def test_an_untrained_checkpoint_is_not_served(tmp_path):
    model, processor = add_latents(2, 8)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is untrained.*recipes/sft_amvl.py"):
        serve(str(tmp_path), port=0, device="cpu")


def test_a_stock_model_is_not_served(tmp_path):
    model, processor = build_tiny_backbone()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a stock model, `llava`.*recipes/sft_amvl.py"):
        serve(str(tmp_path), port=0)


def test_a_checkpoint_that_is_not_there_is_not_served(tmp_path):
    with pytest.raises(ValueError, match=r"`checkpoint` \(.*nothing\) has no configuration that can be read"):
        serve(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "settings",
    [
        {"latent_temperature": -1.0},
        {"latent_temperature": 1e308},
        {"latent_temperature": float("nan")},
        {"max_request_mib": 0},
        {"port": 70_000},
    ],
)
def test_a_bad_setting_is_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        serve("nothing is loaded", **settings)


def test_a_port_in_use_is_a_sentence_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("trainer.serving.server.AMVLModelManager", None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"`port` {port} of `host` '127.0.0.1'.*choose another port"):
            serve(str(folder), port=port)


def test_a_server_of_another_shape_is_refused(folder, monkeypatch):
    manager = AMVLModelManager(str(folder), device="cpu")
    monkeypatch.delattr(ModelManager, "get_model_modality")
    with pytest.raises(
        ImportError, match="`ModelManager` of this release of transformers has no `get_model_modality`"
    ):
        build_app(manager)


def test_the_stock_server_does_not_know_our_class(folder, tmp_path):
    """What README.md says of `transformers serve`: an error, or the stock class under a stock class's name."""
    stock = {"trust_remote_code": True, "device": "cpu"}
    with pytest.raises(AttributeError, match="has no attribute AMVLForConditionalGeneration"):
        ModelManager(force_model=str(folder), **stock)
    renamed = shutil.copytree(folder, tmp_path / NAME)
    config = json.loads((renamed / "config.json").read_text())
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (renamed / "config.json").write_text(json.dumps(config))
    (served,) = ModelManager(force_model=str(renamed), **stock).loaded_models.values()
    assert isinstance(served.model, LlavaForConditionalGeneration)
    (served,) = AMVLModelManager(str(renamed), device="cpu").loaded_models.values()
    assert isinstance(served.model, AMVLForConditionalGeneration)
