"""The Space: what it may import, what it says and shows, how it is published, and all of it in a real browser."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import SpaceCard
from loopback_hub import READ_TOKEN, TOKEN, LoopbackHub
from packaging.requirements import Requirement
from PIL import Image
from selenium.webdriver.common.keys import Keys
from space_page import APP, DONE, PHONE, Page, find_browser, open_browser, running_app
from tiny import build_tiny_backbone

from trainer.base import add_latents
from trainer.data.color_steps import build_color_steps
from trainer.demo import DemoArguments, save_examples
from trainer.diagnostics.relevance import occlude


pytestmark = pytest.mark.xdist_group("space")  # one worker makes what all of them share
ROOT = Path(__file__).resolve().parents[1]
QUESTION = "2 steps from red?"
MODEL, SPACE = "someone/amvl", "someone/space"


# ---------------------------------------------------------------------------------------------------------------------
# Its files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.any_release
def test_the_app_imports_three_libraries_and_nothing_of_the_project():
    nodes = [node for node in ast.walk(ast.parse(APP.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in sorted(nodes, key=lambda node: node.lineno)
    ]
    assert all(len(node.names) == 1 for node in nodes if isinstance(node, ast.Import))
    tops = [module.split(".")[0] for module in modules]
    assert {*tops} - sys.stdlib_module_names == {"transformers", "gradio", "spaces"}
    # ZeroGPU changes torch as `spaces` is imported, and both others import torch.
    assert tops.index("spaces") < min(tops.index("gradio"), tops.index("transformers"))
    assert "__import__" not in APP.read_text() and "importlib" not in APP.read_text()


@pytest.mark.any_release
def test_the_front_matter_and_the_requirements_name_what_was_tested():
    data = SpaceCard.load(APP.with_name("README.md")).data.to_dict()
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    lines = [line for line in APP.with_name("requirements.txt").read_text().splitlines() if not line.startswith("#")]
    needed = {requirement.name: requirement for requirement in map(Requirement, lines)}
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", pins["gradio"], "app.py")
    assert len(data["short_description"]) <= 60  # what the Hub takes
    assert needed.keys() == {"gradio", "spaces", "torch", "transformers"}
    assert str(needed["gradio"].specifier) == f"=={pins['gradio']}"
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (transformers,) = (Requirement(line) for line in declared if Requirement(line).name == "transformers")
    assert needed["transformers"].specifier == transformers.specifier


# ---------------------------------------------------------------------------------------------------------------------
# What it computes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded base with latents that were never trained, but so loud that they change what it says."""
    folder = tmp_path_factory.mktemp("space") / "amvl-loud"
    torch.manual_seed(2)
    model, processor = add_latents(2, 64, initial_log_variance=0.0)
    with torch.no_grad():
        model.latent_projection.weight.mul_(64)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_examples(folder, DemoArguments())
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three files that are no example."""
    folder = tmp_path_factory.mktemp("photos")
    rows = build_color_steps(3, "held_out", 2, ("2_steps",), image_size=144)
    for number, row in enumerate(rows):
        row["images"][0].save(folder / f"photo_{number}.png")
    return sorted(folder.iterdir())


def load_app():
    """app.py as a module of this process."""
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app(checkpoint):
    """app.py with its model."""
    module = load_app()
    module.processor, module.model = module.load(str(checkpoint), "")
    return module


@pytest.fixture
def images(photos):
    return [Image.open(path).convert("RGB") for path in photos]


def test_the_three_answers_are_those_of_own_latents_of_anothers_and_of_none(app, images):
    answers = app.answer(images[0], images[1], QUESTION, 0.0)
    one, two = app.encode(images[:1], QUESTION), app.encode(images[1:2], QUESTION)
    settings = {"max_new_tokens": 64, "do_sample": False}

    def say(inputs, latents):
        return app.decode(app.model.generate(**inputs, **settings, latents=latents), inputs)[0]

    mine, others = app.model.prior(**one).mean, app.model.prior(**two).mean
    off = app.decode(app.model.backbone.generate(**one, **settings), one)[0]
    assert answers == {"on": say(one, mine), "shuffled": say(one, others), "off": off, "other": say(two, others)}
    assert len({answers["on"], answers["shuffled"], answers["off"]}) == 3


def test_without_another_photo_nothing_is_shuffled(app, images):
    answers = app.answer(images[0], None, QUESTION, 0.0)
    assert answers.keys() == {"on", "off"}
    assert answers["on"] == app.answer(images[0], images[1], QUESTION, 0.0)["on"]
    assert "–" in app.answer_cards(answers)


def test_the_spread_counts_every_draw_and_follows_temperature_and_seed(app, images):
    def draw(seed, temperature, number):
        app.set_seed(seed)
        return app.sample(images[0], QUESTION, temperature, number)

    counts = draw(0, 2.0, 16)
    assert sum(count for _, count in counts) == 16 and len(counts) > 1
    assert [count for _, count in counts] == sorted((count for _, count in counts), reverse=True)
    assert draw(0, 2.0, 16) == counts and draw(1, 2.0, 16) != counts
    assert draw(0, 0.001, 8) == [(app.answer(images[0], None, QUESTION, 0.0)["on"], 8)]


@pytest.mark.parametrize("lends", [True, False])
def test_the_map_is_that_of_the_diagnostics(app, images, lends):
    other = images[1] if lends else None
    *_, moved = app.relevance(images[0], other, QUESTION)
    variants = [images[0], images[1], *occlude(images[0], app.NUM_CELLS)]
    whole, others, *occluded = (app.model.prior(**app.encode([image], QUESTION)).mean.flatten() for image in variants)
    unit = (others - whole).norm() if lends else whole.norm()
    expected = (torch.stack(occluded) - whole).norm(dim=1) / unit
    assert expected.max() > 2 * expected.min()
    torch.testing.assert_close(torch.tensor(moved), expected, rtol=0.05, atol=0.01)  # the mean colour is rounded


def test_the_picture_keeps_its_colours_where_z_moves_and_loses_them_elsewhere(app):
    photo = Image.new("RGB", (480, 240), (200, 30, 30))
    moved = [0.0] * app.NUM_CELLS**2
    moved[8] = 0.25  # row 2, column 3
    picture, caption = app.draw_map(photo, moved, "its length")
    assert picture.size == photo.size
    assert picture.getpixel((200, 60)) == (200, 30, 30)
    assert len({*picture.getpixel((20, 60))}) == len({*picture.getpixel((200, 100))}) == 1
    assert "row 2, column 3" in caption and "25% of its length" in caption


@pytest.mark.any_release
def test_what_the_model_says_is_never_taken_for_html(app):
    said = "<img src=x onerror=alert(1)>"
    cards = app.answer_cards({"on": said, "off": said, "shuffled": said, "other": said})
    assert "<img" not in cards + app.spread_bars([(said, 8)], 1.0, 1.0) and cards.count("&lt;img") == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"photo": None}, "There is no photo yet"),
        ({"photo": "unreadable"}, "The photo cannot be read as a picture"),
        ({"other": "unreadable"}, "The other photo cannot be read"),
        ({"photo": Image.new("1", (10_000, 5_001))}, "10000 × 5001 pixels, more than 50 million"),
        ({"photo": Image.new("RGB", (3, 400))}, "too few"),
        ({"photo": Image.new("RGB", (20_000, 30))}, "20000 × 30 pixels: too few are left"),
        ({"photo": Image.new("I;16", (200, 200))}, "more than 8 bits"),
        ({"other": "same"}, "same as the photo"),
        ({"question": None}, "no question"),
        ({"question": " \n"}, "no question"),
        ({"question": "x" * 501}, "501 characters, more than 500"),
        ({"temperature": None}, "temperature has to be from 0 to 3"),
        ({"temperature": -0.1}, "temperature has to be from 0 to 3"),
        ({"temperature": float("nan")}, "temperature has to be from 0 to 3"),
        ({"seed": None}, "seed has to be"),
        ({"seed": -1}, "seed has to be"),
        ({"seed": 2**32}, "seed has to be"),
        ({"seed": 1.5}, "seed has to be a whole number"),
        ({"seed": float("nan")}, "seed has to be"),
        ({"num_samples": 1000}, "has to be one of 8, 16"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(app, images, changes, sentence):
    given = {
        "photo": images[0],
        "other": images[1],
        "question": QUESTION,
        "temperature": 0,
        "seed": 0,
        "num_samples": 8,
    }
    given |= changes
    if given["other"] == "same":
        given["other"] = images[0].copy()
    (shown,) = app.ask(**given)
    assert sentence in shown[0] and "class='error'" in shown[0] and "Traceback" not in shown[0]


def test_large_photos_and_those_of_other_modes_are_asked_about(app, images):
    for photo in (images[0].convert("RGBA"), images[0].convert("P"), images[0].resize((3000, 1500))):
        read = app.check_photo(photo, "photo")
        assert read.mode == "RGB" and max(read.size) <= app.MAX_SIDE


@pytest.mark.parametrize("question", ["<image>", "A <latent> or <|end|>?", "<|assistant|>red"])
def test_what_is_spelt_like_a_token_stays_text(app, images, question):
    special = [app.processor.tokenizer.convert_tokens_to_ids(token) for token in app.tokens_in(question)]
    plain = app.encode(images[:2], QUESTION)["input_ids"]
    asked = app.encode(images[:2], question)["input_ids"]
    assert special and all((asked == token).sum() == (plain == token).sum() for token in special)
    assert question in app.processor.tokenizer.decode(asked[0])
    assert set(app.answer(images[0], images[1], question, 0.0)) == {"on", "off", "shuffled", "other"}


def test_a_token_that_a_processor_cannot_take_as_text_is_refused_in_a_sentence(app, images, monkeypatch):
    known, stock = app.check_inputs(images[0], None, QUESTION, 0, 0, 8), type(app.processor).apply_chat_template

    def without(self, *chats, sanitize_control_tokens=False, **settings):
        if sanitize_control_tokens:
            raise NotImplementedError("`sanitize_control_tokens=True` needs a template that writes special tokens")
        return stock(self, *chats, **settings)

    monkeypatch.setattr(type(app.processor), "apply_chat_template", without)
    (shown,) = app.ask(images[0], None, "Where is <image>?", 0, 0, 8)
    assert "The question holds &#x27;&lt;image&gt;&#x27;, which this model cannot read as text" in shown[0]
    assert app.check_inputs(images[0], None, QUESTION, 0, 0, 8)[2:] == known[2:]  # others are asked


def test_the_page_starts_within_its_slider_and_leaves_a_seed_as_it_is(app, monkeypatch, capsys):
    monkeypatch.setattr(app.model.config, "latent_temperature", 5.0)
    parts = {part.elem_id: part for part in app.build_page([]).blocks.values()}
    assert parts["temperature"].value == parts["temperature"].maximum == app.MAX_TEMPERATURE
    assert "`latent_temperature` is 5; the page starts at its own maximum, 3" in capsys.readouterr().out
    assert parts["seed"].preprocess(1.5) == 1.5  # to be refused, not rounded


def test_a_failure_of_the_model_is_a_sentence_and_a_traceback_in_the_log(app, images, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("out of coffee")

    monkeypatch.setattr(app, "answer", fail)
    *_, shown = app.ask(images[0], images[1], QUESTION, 0, 0, 8)
    assert "The model failed" in shown[0] and "coffee" not in "".join(map(str, shown))
    assert "RuntimeError: out of coffee" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "revision", "sentence"),
    [
        ("someone/amvl", "", "needs the 40 digits of a commit as `REVISION`, got ''"),
        ("someone/amvl", "main", "got 'main'"),
        ("absent-folder", "a" * 39, "no folder here"),
        ("someone/amvl", "a" * 40, "cannot be read"),  # there is no Hub here
        ("stock", "", "a `llava` and no AMVL model"),
        ("empty", "", "cannot be read"),
    ],
)
def test_a_model_that_is_not_pinned_or_has_no_latents_is_refused_in_a_sentence(
    app, tmp_path, monkeypatch, name, revision, sentence
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    if name == "stock":
        for part in build_tiny_backbone():
            part.save_pretrained(name)
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        app.load(name, revision)


def in_config(**changes):
    return lambda settings: settings | changes


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "config.json",
            in_config(auto_map={"AutoConfig": "evil/code--c.X"}),
            "takes its code from elsewhere.*evil/code--",
        ),
        ("config.json", in_config(text={"auto_map": {"AutoModel": "evil/code--c.X"}}), "elsewhere.*evil/code--"),
        ("processor_config.json", in_config(auto_map={"AutoProcessor": "evil/code--p.X"}), "elsewhere.*evil/code--"),
        ("tokenizer_config.json", in_config(auto_map=["evil/code--t.X", None]), "elsewhere.*evil/code--"),
        ("video_preprocessor_config.json", in_config(auto_map={"A": "evil/code--v.X"}), "elsewhere.*evil/code--"),
        ("config.json", in_config(configuration_files=["config.5.0.0.json"]), "has `configuration_files`"),
        ("config.json", in_config(auto_map={}), "no code for `AutoModelForImageTextToText`.*{}"),
        ("config.json", in_config(auto_map=None), "no code for `AutoModelForImageTextToText`.*null"),
        (
            "config.json",
            in_config(auto_map="AutoModelForImageTextToText"),
            "no code for `AutoModelForImageTextToText`",
        ),
        ("config.json", lambda _: [], "holds a `list` and no JSON object"),
        ("processor_config.json", lambda _: 3, "holds a `int` and no JSON object"),
    ],
)
def test_code_of_another_repository_is_not_run(app, checkpoint, tmp_path, monkeypatch, name, change, sentence):
    """transformers would take it from a branch, whatever commit is named."""
    for file in app.CONFIGS:
        if (checkpoint / file).exists():
            shutil.copy(checkpoint / file, tmp_path)
    settings = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    (tmp_path / name).write_text(json.dumps(change(settings)))
    started = []
    monkeypatch.setattr(app.AutoConfig, "from_pretrained", lambda *_, **__: started.append(True))
    with pytest.raises(SystemExit, match=f"whose {name} .*{sentence}"):
        app.load(str(tmp_path), "")
    assert not started


@pytest.mark.parametrize(
    "listing",
    [
        "{",
        "{}",
        "null",
        "[null, 3]",
        json.dumps([{"image": "../../etc/hostname", "question": "?"}, {"image": "config.json", "question": "?"}]),
        json.dumps([{"image": "link.png", "question": "?"}, {"image": "absent.png", "question": "?"}]),
        json.dumps([{"image": "text.png", "question": "?"}, {"image": "photo.png"}]),
        json.dumps([{"image": "photo.png", "question": 3}, {"image": "huge.png", "question": "?"}]),
    ],
    ids=["cut", "dict", "null", "no examples", "no photos", "not there", "no question", "too large"],
)
def test_examples_that_cannot_be_shown_are_left_out_and_said(app, photos, tmp_path, listing, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 144 * 144)  # PIL refuses twice as many
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(photos[0], folder / "photo.png")
    (folder / "link.png").symlink_to(photos[0])
    (folder / "text.png").write_text("hello")
    Image.new("1", (300, 300)).save(folder / "huge.png")
    (folder / "examples.json").write_text(listing)
    assert app.find_examples(str(folder), "") == []
    assert len(re.findall("^.*left out", capsys.readouterr().out, re.MULTILINE)) == (2 if listing[0] == "[" else 1)
    (folder / "examples.json").write_text(json.dumps([None, {"image": "photo.png", "question": QUESTION}]))
    assert app.find_examples(str(folder), "") == [(str(folder / "photo.png"), QUESTION)]  # the others remain


def test_a_photo_of_one_colour_is_no_photo_that_does_not_matter(app):
    photo = Image.new("RGB", (72, 72), "red")
    assert "of one colour" in app.draw_map(photo, [0.0] * 36, "1")[1]
    assert "of one colour" in app.draw_map(photo, [0.0] * 35 + [1e-7], "1")[1]  # what rounding leaves
    photo.putpixel((0, 0), (0, 0, 0))
    assert "did not move Z" in app.draw_map(photo, [0.0] * 36, "1")[1]


def test_examples_are_those_of_the_checkpoint_or_none(app, checkpoint, photos):
    found = app.find_examples(str(checkpoint), "")
    assert [Path(path).name for path, _ in found] == ["example_1.png", "example_2.png", "example_3.png"]
    assert found[0][1] == QUESTION and all(Path(path).is_file() for path, _ in found)
    assert app.find_examples(str(photos[0].parent), "") == []
    assert app.build_page([]) is not None  # a page without any


def test_without_spaces_the_app_says_so_and_goes_on(monkeypatch, capsys):
    assert hasattr(load_app(), "spaces") and capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert load_app().spaces is None
    assert "`spaces` is not installed: fine anywhere but on ZeroGPU" in capsys.readouterr().out


def test_on_zero_gpu_what_needs_the_model_is_what_gets_the_gpu(monkeypatch):
    asked_for = []

    class Spaces:
        @staticmethod
        def GPU(duration):
            return lambda function: asked_for.append((function.__name__, duration)) or function

    monkeypatch.setitem(sys.modules, "spaces", Spaces)
    load_app()
    assert asked_for == [("think", 120)]


# ---------------------------------------------------------------------------------------------------------------------
# Publishing it
# ---------------------------------------------------------------------------------------------------------------------

PUSH_MODEL = "import sys; from huggingface_hub import HfApi; api = HfApi()\napi.create_repo(sys.argv[2])\napi.upload_folder(folder_path=sys.argv[1], repo_id=sys.argv[2])"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def run(hub, home, *command, token=TOKEN, expect=0):
    environment = hub.environment(home) | {"HF_TOKEN": token, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)
    assert finished.returncode == expect, finished.stderr
    assert token not in finished.stdout + finished.stderr
    return finished


def push_space(hub, home, model, *flags, space=SPACE, **settings):
    command = [sys.executable, str(ROOT / "recipes" / "push_space.py"), space, "--model", model, *flags]
    return run(hub, home, *command, **settings)


@pytest.fixture(scope="module")
def published(hub, home, checkpoint, tmp_path_factory):
    """The Space as it lies on the Hub, in a folder, and the commit that it asks, which is no longer the newest."""
    run(hub, home, sys.executable, "-c", PUSH_MODEL, str(checkpoint), MODEL)
    pinned = hub.models[MODEL].head
    assert f"{hub.endpoint}/spaces/{SPACE} asks {MODEL} at {pinned}." in push_space(hub, home, MODEL).stdout
    hub.models[MODEL].commit({})
    folder = tmp_path_factory.mktemp("published")
    for name, file in hub.spaces[SPACE].files.items():
        (folder / name).write_bytes(file.data)
    return folder, pinned


def test_the_published_space_names_its_model_and_one_commit_of_it(published):
    folder, pinned = published
    names = {}
    for line in (folder / "app.py").read_text().splitlines():
        if re.match("(MODEL|REVISION) = ", line):
            exec(line, {"os": os}, names)
    assert names == {"MODEL": MODEL, "REVISION": pinned}
    card = SpaceCard.load(folder / "README.md")
    assert card.data.to_dict()["models"] == [MODEL] and card.data.sdk == "gradio"
    assert card.text == SpaceCard.load(APP.with_name("README.md")).text
    assert (folder / "requirements.txt").read_bytes() == APP.with_name("requirements.txt").read_bytes()


@pytest.mark.parametrize(
    ("model", "flags", "sentence"),
    [
        ("someone/absent", (), "is not on the Hub or private"),
        ("someone/stock", (), "of type 'llava'"),
        ("someone/adapter", (), "an adapter: push the merged model"),
        ("someone/bare", (), "of type None"),
        ("someone/list", (), "of type None"),
        ("someone/codeless", (), "of type 'amvl' with code {}"),
        ("someone/elsewhere", (), "whose config.json takes its code from another repository"),
        ("someone/nested", (), "whose config.json takes its code from another repository"),
        ("someone/replaced", (), "has `configuration_files`"),
        ("someone/text", (), "whose config.json cannot be read"),
        ("someone/processor", (), "whose processor_config.json takes its code from another repository"),
        ("someone/stock", ("--revision", "v9"), "'v9', which `someone/stock` does not have"),
    ],
)
def test_what_the_space_could_not_ask_is_not_published(hub, home, tmp_path, model, flags, sentence):
    contents = {"stock": {"config.json": {"model_type": "llava"}}, "bare": {"README.md": {}}}
    own, other = "modeling_amvl.AMVLForConditionalGeneration", "evil/code--modeling_amvl.X"
    contents["list"] = {"config.json": []}
    contents["codeless"] = {"config.json": {"model_type": "amvl", "auto_map": {}}}
    for name, code in (("elsewhere", other), ("processor", own)):
        contents[name] = {"config.json": {"model_type": "amvl", "auto_map": {"AutoModelForImageTextToText": code}}}
    for name, more in (
        ("nested", {"text": {"auto_map": {"AutoModel": other}}}),
        ("replaced", {"configuration_files": []}),
    ):
        contents[name] = {"config.json": contents["processor"]["config.json"] | more}
    contents["text"] = {"config.json": None}
    contents["processor"]["processor_config.json"] = {"auto_map": {"AutoProcessor": other}}
    contents["adapter"] = {"config.json": {"model_type": "amvl", "auto_map": {}}, "adapter_config.json": {}}
    for name, files in contents.items():
        if f"someone/{name}" not in hub.models:
            folder = tmp_path / name
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_text("{" if content is None else json.dumps(content))
            if model == f"someone/{name}":
                run(hub, home, sys.executable, "-c", PUSH_MODEL, str(folder), f"someone/{name}")
    failed = push_space(hub, home, model, *flags, space="someone/none", expect=1)
    assert sentence in failed.stderr and "Traceback" not in failed.stderr
    assert "someone/none" not in hub.spaces


def test_who_may_not_write_is_told(hub, home, published, tmp_path):
    code = {"AutoModelForImageTextToText": "modeling_amvl.AMVLForConditionalGeneration"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "amvl", "auto_map": code}))
    run(hub, home, sys.executable, "-c", PUSH_MODEL, str(tmp_path), "someone/small")
    failed = push_space(hub, home, "someone/small", space="someone/none", token=READ_TOKEN, expect=1)
    assert "`space` is 'someone/none', to which nothing can be pushed" in failed.stderr
    assert "Traceback" not in failed.stderr


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(published, hub, home, tmp_path_factory):
    """The published Space, asking its model from the Hub, in a browser."""
    if find_browser() is None:
        assert not os.environ.get("CI"), "no browser: `apt-get install -y chromium chromium-driver`"
        pytest.skip("no browser: `apt-get install -y chromium chromium-driver` for this test")
    folder, _ = published
    profile = tmp_path_factory.mktemp("browser")
    with (
        running_app(folder, hub.environment(home), folder / "app.py") as (address, log),
        open_browser(profile) as chrome,
    ):
        page = Page(chrome, address)
        page.log = log
        yield page


@pytest.mark.slow
def test_the_page_in_a_browser(page, app, photos, images, tmp_path, subtests):
    checks = [
        asked_about_an_upload,
        temperature_and_seed,
        examples,
        mistakes,
        keyboard_alone,
        phone_width,
        nothing_but_sentences,
    ]
    for check in checks:
        with subtests.test(check.__name__):
            check(page, app, photos, images, tmp_path)


def expected(app, images, temperature=0.0, seed=0):
    """What the page has to show, by the functions that are tested above."""
    app.set_seed(seed)
    answers = app.answer(images[0], images[1], QUESTION, temperature)
    counts = app.sample(images[0], QUESTION, temperature or 1.0, 8)
    return {name: answers[name] for name in ("on", "shuffled", "off")}, dict(counts)


def asked_about_an_upload(page, app, photos, images, tmp_path):
    page.open()
    page.upload("photo", photos[0])
    page.upload("other", photos[1])
    page.type("#question textarea", QUESTION)
    assert "Another photo's latents change the answer" in page.ask()
    answers, counts = expected(app, images)
    assert page.answers() == answers and page.spread() == counts
    assert app.answer(images[1], None, QUESTION, 0.0)["on"] in page.text("#answer-shuffled .note")
    assert "drawn at temperature 1, since at 0 there is but one" in page.text("#spread .note")
    picture = page.wait(lambda: page.find("#map img"))
    page.wait(lambda: page.browser.execute_script("return arguments[0].naturalWidth", picture) >= 400)
    assert "row" in picture.get_attribute("alt") and page.text("#caption") == picture.get_attribute("alt")


def temperature_and_seed(page, app, photos, images, tmp_path):
    page.type("#temperature input[type=number]", "2")
    assert DONE in page.ask()
    assert (page.answers(), page.spread()) == expected(app, images, temperature=2.0)
    first = page.spread()
    assert "drawn at temperature 2" in page.text("#spread .note") and len(first) > 1
    page.type("#seed input", "5")
    assert DONE in page.ask()
    assert (page.answers(), page.spread()) == expected(app, images, temperature=2.0, seed=5)
    assert page.spread() != first
    page.find("#samples input[value='16']").click()
    assert DONE in page.ask() and sum(page.spread().values()) == 16


def examples(page, app, photos, images, tmp_path):
    """Those of the checkpoint: the first is there at once, and a click brings another."""
    page.open()
    given = page.find("#question textarea").get_attribute("value")
    assert given == QUESTION and DONE in page.ask()
    page.find("#example-1").click()
    page.wait(lambda: page.find("#question textarea").get_attribute("value") != given)
    page.wait(lambda: "Press Ask" in page.text("#status"))
    assert set(page.answers().values()) == {"–"} and DONE in page.ask()


def mistakes(page, app, photos, images, tmp_path):
    page.open()
    page.type("#question textarea", " ")
    assert "There is no question yet" in page.ask()
    page.type("#question textarea", "x" * 501)
    assert "501 characters, more than 500" in page.ask()
    page.type("#question textarea", QUESTION)
    page.type("#seed input", "-3")
    assert "seed has to be a whole number" in page.ask()
    page.type("#seed input", "0")
    whole = photos[0].read_bytes()
    for name, data in {"no_photo.png": b"hello", "cut.png": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(data)
        page.remove("photo")
        assert "There is no photo yet" in page.ask()
        assert set(page.answers().values()) == {"–"} and not page.spread()
        page.upload("photo", tmp_path / name)
        assert "cannot be read as a picture" in page.ask()
    page.upload("photo", photos[0])
    page.upload("other", photos[0])
    assert "same as the photo" in page.ask()
    page.remove("other")
    assert DONE in page.ask() and page.answers()["shuffled"] == "–"


def keyboard_alone(page, app, photos, images, tmp_path):
    page.open()
    visited = []
    for _ in range(30):
        page.press(Keys.TAB)
        focused = page.browser.switch_to.active_element
        if focused.tag_name == "body" or focused in visited:
            break
        assert focused.accessible_name, focused.get_attribute("outerHTML")
        ring = focused.value_of_css_property("outline-style"), focused.value_of_css_property("outline-width")
        assert ring[0] != "none" and ring[1] != "0px", focused.get_attribute("outerHTML")
        visited.append(focused)
        # Each in its place: the focus goes down the column, to the button last.
        if "Temperature" in focused.accessible_name and focused.get_attribute("type") == "range":
            page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        if focused.tag_name == "textarea":
            page.press(Keys.CONTROL + "a", QUESTION)
    order = [element.get_attribute("id") or element.accessible_name for element in visited]
    assert order[-1] == "ask" and order.index("Question") < order.index("example-0") < order.index("Seed")
    visited[-1].send_keys("")  # the last one has the focus, if the list was not left
    assert DONE in page.ask(lambda: page.press(Keys.ENTER))
    assert "drawn at temperature 0.2" in page.text("#spread .note")
    visited[order.index("Question")].send_keys("")
    assert DONE in page.ask(lambda: page.press(Keys.ENTER))


def phone_width(page, app, photos, images, tmp_path):
    page.open(PHONE)
    assert DONE in page.ask()
    width, needed = page.browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert width == needed == PHONE[0]
    parts = page.browser.find_elements("css selector", ".card, #map img, #question textarea, #ask, #temperature input")
    assert len(parts) >= 8
    for part in parts:
        assert part.rect["x"] >= 0 and part.rect["x"] + part.rect["width"] <= PHONE[0], part.get_attribute("outerHTML")


def nothing_but_sentences(page, app, photos, images, tmp_path):
    assert "Traceback" not in page.browser.page_source and "Traceback" not in page.log.read_text()
    severe = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if page.address in message] == []
