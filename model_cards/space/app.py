"""Asks an AMVL model about a photograph: latents on, shuffled and off, over sampled latents, and where they look.

    MODEL=amvl-demo python app.py

`MODEL` is a folder, or a Hub id with the 40 digits of a commit as `REVISION`, since the code that comes with a model is run.
Needs transformers (with torch), gradio and, on ZeroGPU, spaces.
"""

import html
import json
import os
import re
import time
import traceback
from collections import Counter
from pathlib import Path


try:
    import spaces  # first, since ZeroGPU changes torch as it is imported
except ImportError:
    spaces = None
    print("`spaces` is not installed: fine anywhere but on ZeroGPU, where `pip install spaces` is needed.")

import gradio as gr
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.image_utils import load_image
from transformers.utils import cached_file, is_torch_cuda_available
from transformers.utils.hub import is_offline_mode


MODEL = os.environ.get("MODEL", "amvl-demo")
REVISION = os.environ.get("REVISION", "")

MAX_QUESTION = 500  # characters
MAX_PIXELS = 50_000_000  # of a photo as it is uploaded
MAX_SIDE = 1024  # pixels, what a photo is scaled down to
MAX_FILE_SIZE = "20mb"
MAX_NEW_TOKENS = 64
MAX_TEMPERATURE = 3.0
MAX_SEED = 2**32 - 1
NUM_SAMPLES = (8, 16)
NUM_CELLS = 6  # along each side of the map
MAP_BATCH = 12  # photos at a time
GPU_SECONDS = 120  # of ZeroGPU, for one question


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


# Where transformers looks for the names of code.
CONFIGS = (
    *("config.json", "processor_config.json", "tokenizer_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)


def read_config(path):
    """What a JSON file holds, and each `auto_map` in it, at any depth, as text."""
    maps = []

    def note(found):
        maps.append(json.dumps(found.get("auto_map")))
        return found

    return json.loads(Path(path).read_text(encoding="utf-8"), object_hook=note), maps


def refuse_code_from_elsewhere(name, revision):
    """Refuses a checkpoint whose code is not at its own commit: transformers takes `other/repository--file.Class` from a branch."""
    # Only a file that is known to be missing is passed over; without any connection, what is not here is not loaded either.
    settled = {
        "revision": revision or None,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": not is_offline_mode(),
    }
    for file in CONFIGS:
        try:
            if (path := cached_file(name, file, **settled)) is None:
                continue  # without config.json nothing is loaded
            settings, maps = read_config(path)
        except OSError as error:
            raise SystemExit(f"`MODEL` is {name!r}, which cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise SystemExit(f"`MODEL` is {name!r}, whose {file} cannot be read: {error}") from error
        if not isinstance(settings, dict):
            raise SystemExit(
                f"`MODEL` is {name!r}, whose {file} holds a `{type(settings).__name__}` and no JSON object: save the model anew."
            )
        for classes in maps:
            if "--" in classes:
                raise SystemExit(
                    f"`MODEL` is {name!r}, whose {file} takes its code from elsewhere, {classes[:200]}, at no commit that is named "
                    "here: push the model with its own code, as `trainer.hub.push_folder` does."
                )
        if "configuration_files" in settings:
            raise SystemExit(
                f"`MODEL` is {name!r}, whose {file} has `configuration_files`, which would be read in its place: leave them out."
            )
        classes = settings.get("auto_map")
        is_named = isinstance(classes, dict) and isinstance(classes.get("AutoModelForImageTextToText"), str)
        if file == "config.json" and settings.get("model_type") == "amvl" and not is_named:
            raise SystemExit(
                f"`MODEL` is {name!r}, whose config.json names no code for `AutoModelForImageTextToText` in its `auto_map`, "
                f"{json.dumps(classes)[:200]}: push the model with its own code, as `trainer.hub.push_folder` does."
            )
    if not os.path.isdir(name) and cached_file(name, "adapter_config.json", **settled) is not None:
        raise SystemExit(
            f"`MODEL` is {name!r}, an adapter, whose base no commit pins: push the merged model "
            "(`trainer.adapters.merge_adapter`)."
        )


def load(name, revision):
    """
    Loads a checkpoint with the code that it carries, onto a GPU where there is one.

    Args:
        name (`str`): a folder or a Hub id.
        revision (`str`): the commit of a Hub id; a folder has none.

    Returns:
        `tuple`: the processor and the model.

    Raises:
        SystemExit: a Hub id without a commit, no AMVL model, or one that brings no code of its own.
    """
    if not os.path.isdir(name) and not re.fullmatch("[0-9a-f]{40}", revision):
        raise SystemExit(
            f"`MODEL` is {name!r}, no folder here and so a Hub id, which needs the 40 digits of a commit as `REVISION`, got "
            f"{revision!r}: the code that comes with a model is run, and a branch may change. Set both, or train a folder by "
            "`accelerate launch recipes/sft_amvl.py`."
        )
    source = {"revision": revision or None, "trust_remote_code": True}
    refuse_code_from_elsewhere(name, revision)
    try:
        model_type = AutoConfig.from_pretrained(name, **source).model_type
    except (OSError, ValueError) as error:
        raise SystemExit(f"`MODEL` is {name!r}, which cannot be read: {error}") from error
    if model_type != "amvl":
        raise SystemExit(
            f"`MODEL` is {name!r}, a `{model_type}` and no AMVL model: it has no latents that could be switched off."
        )
    processor = AutoProcessor.from_pretrained(name, **source)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", **source)
    model.eval().requires_grad_(False)  # `prior` computes no gradients then
    return processor, model.to("cuda") if is_torch_cuda_available() else model


def find_examples(name, revision):
    """Photos and questions that come with a checkpoint, as `(path, question)`; what cannot be shown is left out, and printed."""
    source, found = {"revision": revision or None}, []
    try:
        listing = cached_file(name, "examples.json", **source)
        with open(listing, encoding="utf-8") as file:
            listed = json.load(file)
    except OSError:
        return []  # it has none
    except (ValueError, RecursionError) as error:
        listed = f"no JSON ({error})"
    if not isinstance(listed, list):
        print(f"examples.json is left out: it is no list of examples but {str(listed)[:200]}.")
        return []
    root = os.path.dirname(os.path.realpath(listing))  # the Hub's cache links to files that lie beside each other
    for example in listed:
        image, question = (
            (example.get("image"), example.get("question")) if isinstance(example, dict) else (None, None)
        )
        is_photo = isinstance(image, str) and re.fullmatch(
            r"(?!.*\.\.)[\w][\w./ -]*\.(png|jpe?g|webp)", image, re.IGNORECASE
        )
        try:
            if not is_photo or not isinstance(question, str):
                raise ValueError("no photo of the checkpoint (`image`) with a `question`")
            path = cached_file(name, image, **source)
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise ValueError("a link out of the checkpoint")
            load_image(path)
        except Exception as error:  # whatever PIL raises on what is no picture
            print(f"An example is left out, {str(example)[:200]}: {' '.join(str(error).split())}.")
            continue
        found.append((path, question))
    return found


def tokens_in(question):
    """The added tokens, such as the image's, that a question spells."""
    return [token for token in processor.tokenizer.added_tokens_encoder if token.strip() and token in question]


def tokenize(photos, question):
    """The prompts of one question about several photos; what is spelt like a token in it stays text."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": question}]}]
        for photo in photos
    ]
    as_text = {"sanitize_control_tokens": True} if tokens_in(question) else {}  # not every processor can
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **as_text,
    )


def encode(photos, question):
    """The same on the model's device."""
    return tokenize(photos, question).to(model.device, model.dtype)


def decode(sequences, inputs):
    """The answers alone."""
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def answer(photo, other, question, temperature):
    """
    One question, with the photo's own latents, with those of another photo, and without any.

    Returns:
        `dict[str, str]`: `on`, `shuffled` and `off` about the photo, `other` about the other one; of `shuffled` and `other` none
        without another photo.
    """
    inputs = encode([photo] if other is None else [photo, other], question)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    own = model.generate(**inputs, **settings, latent_temperature=temperature, return_dict_in_generate=True)
    said = decode(own.sequences, inputs)
    answers = {"on": said[0], "off": decode(model.backbone.generate(**inputs, **settings), inputs)[0]}
    if other is not None:
        swapped = model.generate(**inputs, **settings, latents=own.latents.flip(0))  # each photo gets the other's Z
        answers |= {"shuffled": decode(swapped, inputs)[0], "other": said[1]}
    return answers


def sample(photo, question, temperature, num_samples):
    """How often each answer comes over `num_samples` draws of the latents, the most frequent first."""
    inputs = encode([photo], question)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    sequences = model.generate(**inputs, **settings, num_latent_samples=num_samples, latent_temperature=temperature)
    return Counter(decode(sequences, inputs)).most_common()


def boxes(photo):
    """The cells of a photo in reading order, as PIL's boxes."""
    columns, rows = (
        [round(place * side / NUM_CELLS) for place in range(NUM_CELLS + 1)] for side in (photo.width, photo.height)
    )
    return [
        (columns[column], rows[row], columns[column + 1], rows[row + 1])
        for row in range(NUM_CELLS)
        for column in range(NUM_CELLS)
    ]


def relevance(photo, other, question):
    """
    How far Z, the prior's mean, moves when a cell of the photo gets the photo's mean colour.

    Yields:
        `list[float]`: the movement of the cells read so far; 1 is the way to the other photo's Z, or the length of Z without another.
    """
    grey = photo.resize((1, 1), 4).getpixel((0, 0))  # 4 averages
    variants = [photo, photo if other is None else other]
    for box in boxes(photo):
        variants.append(photo.copy())
        variants[-1].paste(grey, box)
    moved = []
    for start in range(0, len(variants), MAP_BATCH):
        means = model.prior(**encode(variants[start : start + MAP_BATCH], question)).mean.flatten(1).float()
        if start == 0:
            whole = means[:1]
            unit = (whole if other is None else means[1:2] - whole).norm().clamp(min=1e-12)
        moved += ((means - whole).norm(dim=1) / unit).tolist()
        yield moved[2:]


# ---------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------


def answer_cards(answers):
    """The three answers side by side, as HTML; dashes before anything was asked."""
    other = answers.get("other")
    cards = {
        "on": ("Latents on", "Z of the photo"),
        "shuffled": (
            "Latents shuffled",
            "Z of the other photo"
            + (f", whose own answer is “{html.escape(other) or 'nothing'}”" if other is not None else ""),
        ),
        "off": ("Latents off", "the same weights without Z"),
    }
    return "".join(
        f"<section class='card' id='answer-{name}' aria-label='{title}'><h3>{title}</h3>"
        f"<p class='said'>{shown(answers.get(name))}</p><p class='note'>{note}</p></section>"
        for name, (title, note) in cards.items()
    )


def shown(text):
    """An answer as HTML; a dash where there is none."""
    return "–" if text is None else html.escape(text) or "(nothing)"


def spread_bars(counts, temperature, asked):
    """Shares of the sampled answers as bars, as HTML."""
    total = sum(count for _, count in counts)
    bars = "".join(
        f"<li><span class='text'>{shown(text)}</span><span class='share'>{count} of {total}</span>"
        f"<span class='bar' aria-hidden='true'><span style='width:{100 * count / total:.0f}%'></span></span></li>"
        for text, count in counts
    )
    why = "" if temperature == asked else ", since at 0 there is but one"
    return (
        f"<section class='card' aria-label='Spread of answers'><h3>Answers over {total} draws of Z</h3><ul>{bars}</ul>"
        f"<p class='note'>drawn at temperature {temperature:g}{why}</p></section>"
    )


def draw_map(photo, moved, unit):
    """
    The photo, in colour where greying a cell out moves Z, faded elsewhere.

    Args:
        photo (`PIL.Image.Image`): RGB.
        moved (`list[float]`): see [`relevance`].
        unit (`str`): what 1 is, in words.

    Returns:
        `tuple[PIL.Image.Image, str]`: the picture, and what it shows in a sentence.
    """
    scale = max(1, round(480 / max(photo.size)))
    photo = photo.resize((photo.width * scale, photo.height * scale), 3)  # 3 is bicubic
    picture = photo.convert("L").point(lambda value: 190 + value // 5).convert("RGB")
    is_one_colour = photo.getcolors(1) is not None
    most = max(moved)
    if is_one_colour and most < 0.01:  # nothing changed; batches of other sizes may round otherwise
        most = 0
    for box, value in zip(boxes(photo), moved):
        cell = photo.crop(box)
        opacity = round(255 * value / most) if most else 0
        picture.paste(cell, box, cell.convert("L").point([opacity] * 256))
    if not most:
        if is_one_colour:
            return picture, "The photo is of one colour, so that greying a cell out changes nothing."
        return picture, "Greying a cell out did not move Z anywhere."
    row, column = divmod(moved.index(most), NUM_CELLS)
    return picture, (
        f"In colour where greying a cell out moves Z; most in row {row + 1}, column {column + 1} of {NUM_CELLS} × {NUM_CELLS}, by "
        f"{most:.0%} of {unit}."
    )


def verdict(answers):
    """What the three answers say about the latents, in a sentence."""
    if "shuffled" not in answers:
        return (
            "The latents make no difference here." if answers["on"] == answers["off"] else "The latents matter here."
        )
    if answers["on"] == answers["shuffled"] == answers["off"]:
        return "All three agree: this answer does not come from the latents."
    if answers["on"] != answers["shuffled"]:
        return "Another photo's latents change the answer: it depends on what they hold."
    return "Only switching the latents off changes the answer: whose they are makes no difference."


def show(text, answers=None, spread="", picture=None, caption="", is_error=False):
    """What the five fields of the page get."""
    return (
        f"<p class='{'error' if is_error else 'told'}'>{html.escape(text)}</p>",
        answer_cards(answers or {}),
        spread,
        gr.Image(picture, alt_text=caption, visible=picture is not None),
        f"<p class='note'>{caption}</p>" if caption else "",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


UNREADABLE = "unreadable"


def hand_over_unreadable(field):
    """Makes an image field hand over a file that is no picture as `UNREADABLE`, to be told in a sentence."""
    read = field.preprocess

    def preprocess(payload):
        try:
            return read(payload)
        except Exception:  # whatever PIL raises on what people upload
            return UNREADABLE

    field.preprocess = preprocess
    return field


class Refused(Exception):
    """Something a person can mend, in a sentence."""


def check_photo(image, which):
    """A photo in RGB, scaled down to `MAX_SIDE`."""
    hint = "Choose a JPEG or PNG file."
    if image is None:
        raise Refused(f"There is no {which} yet. {hint}")
    if image == UNREADABLE:
        raise Refused(f"The {which} cannot be read as a picture. {hint}")
    if image.mode.startswith(("I", "F")):
        raise Refused(f"The {which} has more than 8 bits for a colour, which would be cut off. Save it with 8.")
    if image.width * image.height > MAX_PIXELS:
        raise Refused(
            f"The {which} has {image.width} × {image.height} pixels, more than {MAX_PIXELS // 10**6} million. Scale it down."
        )
    try:
        image = image.convert("RGB")
    except Exception as error:  # a file that is cut short
        raise Refused(f"The {which} is damaged: it ends too early. {hint}") from error
    given = f"The {which} has {image.width} × {image.height} pixels"
    if min(image.size) < NUM_CELLS:
        raise Refused(f"{given}, too few to see anything on.")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    if min(image.size) < NUM_CELLS:
        raise Refused(f"{given}: too few are left once its longer side is scaled down to {MAX_SIDE}. Crop it.")
    return image


def check_inputs(photo, other, question, temperature, seed, num_samples):
    """What was asked for in bounds, or [`Refused`]."""
    photo = check_photo(photo, "photo")
    question = (question or "").strip()
    if not question:
        raise Refused("There is no question yet. Type one.")
    if len(question) > MAX_QUESTION:
        raise Refused(f"The question has {len(question)} characters, more than {MAX_QUESTION}. Shorten it.")
    if tokens := tokens_in(question):
        try:
            tokenize([photo], question)
        except Exception as error:  # whatever a processor raises that cannot
            raise Refused(
                f"The question holds {tokens[0]!r}, which this model cannot read as text. Take it out."
            ) from error
    other = None if other is None else check_photo(other, "other photo")
    if other is not None and other.size == photo.size and other.tobytes() == photo.tobytes():
        raise Refused(
            "The other photo is the same as the photo, and so are its latents. Choose another, or remove it."
        )
    if temperature is None or not 0 <= temperature <= MAX_TEMPERATURE:
        raise Refused(f"The temperature has to be from 0 to {MAX_TEMPERATURE:g}.")
    if seed is None or not 0 <= seed <= MAX_SEED or seed != int(seed):
        raise Refused(f"The seed has to be a whole number from 0 to {MAX_SEED}.")
    if num_samples not in NUM_SAMPLES:
        raise Refused(f"The number of draws has to be one of {', '.join(map(str, NUM_SAMPLES))}.")
    return photo, other, question, float(temperature), int(seed), int(num_samples)


def think(photo, other, question, temperature, seed, num_samples):
    """All that needs the model; yields what the fields show, as it comes."""
    began = time.perf_counter()
    set_seed(seed)
    answers = answer(photo, other, question, temperature)
    result = verdict(answers)
    yield show(f"{result} Drawing {num_samples} latents …", answers)
    drawn_at = temperature or 1.0
    spread = spread_bars(sample(photo, question, drawn_at, num_samples), drawn_at, temperature)
    for moved in relevance(photo, other, question):
        yield show(f"{result} Looking where Z looks: {len(moved)} of {NUM_CELLS**2} cells …", answers, spread)
    unit = "its length" if other is None else "the way to the other photo's Z"
    picture, caption = draw_map(photo, moved, unit)
    yield show(f"{result} Done in {time.perf_counter() - began:.1f} s.", answers, spread, picture, caption)


if spaces is not None:
    think = spaces.GPU(duration=GPU_SECONDS)(think)


def ask(photo, other, question, temperature, seed, num_samples):
    """What the button does: a sentence where something is missing or fails, never a stack trace."""
    try:
        inputs = check_inputs(photo, other, question, temperature, seed, num_samples)
        yield show("Asking …")
        yield from think(*inputs)
    except Refused as refusal:
        yield show(str(refusal), is_error=True)
    except gr.Error:  # ZeroGPU's, when a person's share of it is used up
        raise
    except Exception:  # the log has all of it, the page what a person can do
        traceback.print_exc()
        text = (
            "The model failed on this one. Try another photo or a shorter question; the server's log has the reason."
        )
        yield show(text, is_error=True)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Ask a photo, with and without latents

{name} fills {num_latents} continuous latents, Z, before it answers. Here it answers three times: with its own Z, with the Z of another
photo, and without. Where all three agree, Z made no difference.
"""
THEME = gr.themes.Default(primary_hue="indigo", font="system-ui", font_mono="monospace").set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
)
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.gradio-container h1 { font-size: 1.6rem; margin: 0.5rem 0 0.25rem; }
#photo .image-frame, #other .image-frame, #map .image-frame { padding-top: 1.75rem; }  /* below the label */
#photo img, #other img, #map img { object-fit: contain; width: 100%; height: 100%; max-height: 420px; }
:is(button, input, textarea):focus-visible { outline: 2px solid var(--primary-500) !important; outline-offset: 2px; }
#status .html-container, #answers .html-container, #spread .html-container, #caption .html-container { padding: 0; }
#status .prose { min-height: 3rem; }
#status .told, #status .error { font-size: 1rem; margin: 0; }
#status .error { border-left: 4px solid #b91c1c; padding-left: 0.75rem; font-weight: 600; }
#answers .prose { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 0.75rem 1rem; }
.card h3 { font-size: 0.875rem; font-weight: 500; margin: 0; color: var(--body-text-color-subdued); }
.card .said { font-size: 1.5rem; font-weight: 600; line-height: 1.3; margin: 0.25rem 0; overflow-wrap: anywhere; }
.note { font-size: 0.8125rem; margin: 0.25rem 0 0; color: var(--body-text-color-subdued); }
#answer-on { border-color: var(--primary-500); box-shadow: inset 0 3px 0 var(--primary-500); }
#examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); }
#spread ul { list-style: none; margin: 0.5rem 0; padding: 0; }
#spread li { display: grid; grid-template-columns: 1fr auto; gap: 0.2rem 0.75rem; margin: 0 0 0.5rem; padding: 0; }
#spread .text { font-weight: 600; overflow-wrap: anywhere; }
#spread .bar { grid-column: 1 / -1; height: 0.5rem; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
#spread .bar span { display: block; height: 100%; background: var(--primary-500); }
"""


def build_page(examples):
    """
    The page.

    Args:
        examples (`list[tuple[str, str]]`): photos and questions to begin with; each lends its latents to the one before it.

    Returns:
        `gr.Blocks`.
    """
    name = os.path.basename(os.path.normpath(MODEL)) if os.path.isdir(MODEL) else MODEL
    lenders = [path for path, _ in examples[1:] + examples[:1]] if len(examples) > 1 else [None] * len(examples)
    path, text = examples[0] if examples else (None, None)
    default = model.config.latent_temperature
    if default > MAX_TEMPERATURE:
        print(
            f"The model's `latent_temperature` is {default:g}; the page starts at its own maximum, {MAX_TEMPERATURE:g}."
        )
    image = {"type": "pil", "image_mode": None, "sources": "upload", "buttons": [], "min_width": 140, "height": 240}
    with gr.Blocks(title="Ask a photo, with and without latents", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION.format(name=f"`{name}`", num_latents=model.config.num_latents))
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    photo = gr.Image(
                        path, label="Photo", alt_text="The photo that is asked about", elem_id="photo", **image
                    )
                    other = gr.Image(
                        lenders[0] if examples else None,
                        label="Other photo",
                        alt_text="The photo whose latents are lent",
                        elem_id="other",
                        **image,
                    )
                question = gr.Textbox(
                    text, label="Question", placeholder="What is asked about the photo", elem_id="question"
                )
                fills = []
                if examples:
                    with gr.Row(elem_id="examples"):
                        for number, ((path, text), lender) in enumerate(zip(examples, lenders)):
                            example = gr.Button(text, icon=path, size="sm", min_width=100, elem_id=f"example-{number}")
                            fills.append((example, (path, lender, text)))
                temperature = gr.Slider(
                    0,
                    MAX_TEMPERATURE,
                    min(default, MAX_TEMPERATURE),
                    step=0.1,
                    label="Temperature of Z (0: its mean)",
                    elem_id="temperature",
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", min_width=120, elem_id="seed")  # `precision=0` would round
                    num_samples = gr.Radio(
                        [(f"{number} draws", number) for number in NUM_SAMPLES],
                        value=NUM_SAMPLES[0],
                        label="Spread",
                        scale=2,
                        min_width=120,
                        elem_id="samples",
                    )
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=6, min_width=320):
                told, cards, *_ = show("Choose a photo, type a question, and press Ask.")
                status = gr.HTML(told, elem_id="status", js_on_load="element.setAttribute('role', 'status')")
                answers = gr.HTML(cards, elem_id="answers")
                with gr.Row():
                    with gr.Column(min_width=230):
                        spread = gr.HTML(elem_id="spread")
                    with gr.Column(min_width=230):
                        picture = gr.Image(
                            label="Where Z looks", interactive=False, buttons=[], visible=False, elem_id="map"
                        )
                        caption = gr.HTML(elem_id="caption")
        outputs = [status, answers, spread, picture, caption]
        for example, values in fills:
            example.click(
                lambda values=values: (*values, *show("Press Ask.")),
                None,
                [photo, other, question, *outputs],
                api_visibility="private",
            )
        for field in (photo, other):
            hand_over_unreadable(field)
        gr.on(
            [button.click, question.submit],
            ask,
            [photo, other, question, temperature, seed, num_samples],
            outputs,
            concurrency_limit=1,
            trigger_mode="once",
            show_progress="minimal",
            api_name="ask",
        )
    return page


if __name__ == "__main__":
    processor, model = load(MODEL, REVISION)
    page = build_page(find_examples(MODEL, REVISION)).queue(max_size=32)
    page.launch(theme=THEME, css=CSS, ssr_mode=False, max_file_size=MAX_FILE_SIZE, footer_links=[])
