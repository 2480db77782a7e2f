"""`pipeline("image-text-to-text")`, chats of several turns, and streams: each answers as `generate` on the same text does."""

import threading

import pytest
import torch
from PIL import Image
from transformers import TextIteratorStreamer, pipeline

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer.base import EMBEDDED


NUM_SAMPLES = 5
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SAMPLES = {**GREEDY, "num_latent_samples": NUM_SAMPLES, "latent_temperature": 100.0}  # so that answers differ


@pytest.fixture(scope="module")
def pipe():
    """Over the embedded base, whose answers end, with latents that change them."""
    processor = AMVLProcessor.from_backbone(EMBEDDED)
    torch.manual_seed(0)
    model = AMVLForConditionalGeneration.from_backbone(
        EMBEDDED,
        num_latents=2,
        latent_size=16,
        latent_token_id=processor.latent_token_id,
        initial_token_id=processor.answer_start_id,
        initial_log_variance=2.0,
    )
    return pipeline("image-text-to-text", model=model.eval(), processor=processor)


def user(text, *colors):
    images = [{"type": "image", "image": Image.new("RGB", (64, 64), color)} for color in colors]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CHATS = [
    [user("1 step from red?", "red")],
    [user("which of these two is blue?", "red", "blue")],
    [user("1 step from red?", "red"), assistant("blue"), user("and 2 steps?", "green")],
    [user("say something")],
]


def seeded():
    return torch.Generator().manual_seed(0)


def generated(pipe, chat, **settings):
    """Texts that `generate` answers with, by hand."""
    inputs = pipe.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answers = pipe.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return pipe.processor.batch_decode(answers, skip_special_tokens=True)


def texts(records):
    return [record["generated_text"] for record in records]


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_chats_are_answered_as_by_generate(pipe, batch_size):
    """Several images in a message, several turns and none of either, also in one padded batch."""
    answers = pipe(text=CHATS, batch_size=batch_size, return_full_text=False, generate_kwargs=GREEDY)
    expected = [generated(pipe, chat, **GREEDY) for chat in CHATS]
    assert [texts(answer) for answer in answers] == expected
    assert len({tuple(answer) for answer in expected}) > 1
    alone = pipe(text=CHATS[1], return_full_text=False, generate_kwargs=GREEDY)
    assert texts(alone) == expected[1]


def test_every_sample_is_returned_to_its_chat(pipe):
    expected = [generated(pipe, chat, **SAMPLES, generator=seeded()) for chat in CHATS[:2]]
    assert any(len(set(answer)) > 1 for answer in expected)
    for batch_size in (1, 2):  # one by one, the noise of the second chat is the generator's next
        settings = {**SAMPLES, "generator": seeded()}
        answers = pipe(text=CHATS[:2], batch_size=batch_size, return_full_text=False, generate_kwargs=settings)
        assert [len(answer) for answer in answers] == [NUM_SAMPLES] * 2
        assert [texts(answer) for answer in answers][:batch_size] == expected[:batch_size]
        for chat, answer in zip(CHATS, answers, strict=False):
            assert all(record["input_text"] == chat for record in answer)


def test_the_majority_is_one_answer(pipe):
    settings = SAMPLES | {"return_majority": True}
    answers = pipe(
        text=CHATS[:2], batch_size=2, return_full_text=False, generate_kwargs={**settings, "generator": seeded()}
    )
    expected = [generated(pipe, chat, **settings, generator=seeded()) for chat in CHATS[:2]]
    assert [texts(answer) for answer in answers] == expected


def test_the_full_text_is_the_chat_with_each_sample(pipe):
    answers = pipe(text=CHATS[2], generate_kwargs={**SAMPLES, "generator": seeded()})
    expected = generated(pipe, CHATS[2], **SAMPLES, generator=seeded())
    assert texts(answers) == [[*CHATS[2], {"role": "assistant", "content": text}] for text in expected]


def test_images_and_text_need_no_chat(pipe):
    prompts = ["<image>1 step from red?", "2 steps from <image>?"]
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    answers = pipe(
        text=prompts, images=images, return_full_text=False, generate_kwargs={**SAMPLES, "generator": seeded()}
    )
    inputs = pipe.processor(text=prompts, images=images, return_tensors="pt", padding=True)
    sequences = pipe.model.generate(**inputs, **SAMPLES, generator=seeded())
    expected = pipe.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts(answers) == expected and len(expected) == 2 * NUM_SAMPLES


def test_a_stream_is_the_answer(pipe):
    (expected,) = generated(pipe, CHATS[1], **GREEDY)
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(
        target=pipe, kwargs={"text": CHATS[1], "generate_kwargs": {**GREEDY, "streamer": streamer}}
    )
    thread.start()
    assert "".join(streamer) == expected != ""
    thread.join()


def test_a_stream_of_several_samples_is_refused(pipe):
    streamer = TextIteratorStreamer(pipe.tokenizer)
    with pytest.raises(ValueError, match="does not go with a `streamer`"):
        pipe(text=CHATS[0], generate_kwargs={**SAMPLES, "streamer": streamer})


@pytest.mark.parametrize(
    "name", ["num_latent_samples", "latent_temperature", "return_majority", "latents", "generator"]
)
@pytest.mark.parametrize("form", ["chat", "text"])
def test_arguments_that_would_not_reach_generate_are_refused(pipe, name, form):
    """The pipeline hands what it does not know to the processor, which would ignore it."""
    inputs = {"text": CHATS[0]} if form == "chat" else {"text": "<image>?", "images": Image.new("RGB", (64, 64))}
    with pytest.raises(
        ValueError, match=rf"`{name}` is an argument of `generate`.*generate_kwargs=\{{'{name}': ...\}}"
    ):
        pipe(**inputs, **{name: 2}, return_full_text=False)


# ---------------------------------------------------------------------------------------------------------------------
# Several turns
# ---------------------------------------------------------------------------------------------------------------------


def test_a_chat_of_several_turns_is_a_fresh_prompt_of_the_same_text(pipe):
    """Latents come before the answer that is generated; the earlier ones are text and nothing else."""
    processor, model, chat = pipe.processor, pipe.model, CHATS[2]
    from_chat = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.count("<|assistant|>") == 2 and "blue<|end|>" in text
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "green")]
    fresh = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    assert from_chat.keys() == fresh.keys() and all(torch.equal(from_chat[key], fresh[key]) for key in fresh)
    assert processor.latent_token_id not in from_chat["input_ids"]
    asked, model_asked = (model.generate(**inputs, **SAMPLES, generator=seeded()) for inputs in (from_chat, fresh))
    assert torch.equal(asked, model_asked)


def test_what_was_answered_goes_on_as_text(pipe):
    """A chat that is held with the model: its own answers come back as turns, whichever latents they were given by."""
    chat, held = [], []
    for turn in (user("1 step from red?", "red"), user("and 2 steps?"), user("and 3?")):
        chat.append(turn)
        (record,) = pipe(text=chat, return_full_text=True, generate_kwargs=GREEDY)
        chat = record["generated_text"]
        held.append(chat[-1]["content"])
    before = chat[:-1]
    assert generated(pipe, before, **GREEDY) == held[-1:]
    # Another earlier answer, another prompt: the turns are read.
    other = [*before[:1], assistant("some other answer"), *before[2:]]
    rendered = [
        pipe.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in (before, other)
    ]
    assert held[0] in rendered[0] and rendered[0] != rendered[1]
