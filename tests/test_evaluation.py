"""The evaluation asks what it says it asks: stock generation, with latents from the named source."""

import copy

import datasets
import matplotlib.figure
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_tiny_backbone

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer.evaluation import LATENT_SOURCES, answer_questions
from trainer.pictures import PANELS, plot_training_curves


NUM_NEW = 6
QUESTIONS = (  # prompts of different lengths: a batch of them is padded
    "What color is the shape?",
    "How many red shapes are there at the top left, at the center and at the bottom right?",
    "Which corner does not belong to the photo?",
    "Where is the red shape?",
    "color",
)
GOLD = ("red", "2", "top left", "left", "blue")


@pytest.fixture(scope="module")
def parts():
    """A stock model that never stops by itself, its stock processor, and an AMVL model over a copy whose latents count."""
    backbone, stock_processor = build_tiny_backbone(seed=0)
    backbone.generation_config.eos_token_id = None  # random models end at random
    processor = AMVLProcessor.from_backbone(stock_processor)
    torch.manual_seed(0)
    model = AMVLForConditionalGeneration.from_backbone(
        copy.deepcopy(backbone), num_latents=4, latent_size=16, latent_token_id=processor.latent_token_id
    )
    with torch.no_grad():  # prior and posterior start as one map, and latents as large as one token
        for parameter in (*model.prior_head.parameters(), *model.posterior_head.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.latent_projection.weight.mul_(8)
    return backbone, stock_processor, model, processor


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in QUESTIONS]


@pytest.fixture(scope="module")
def rows():
    return datasets.Dataset.from_list(
        [
            {
                "images": [picture],
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
            }
            for picture, question, answer in zip(pictures(), QUESTIONS, GOLD, strict=True)
        ]
    )


def prompts_one_by_one(processor):
    for picture, question in zip(pictures(), QUESTIONS, strict=True):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        yield processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


def answers_one_by_one(processor, generate):
    """The reference: each row alone, without padding, in the processor's own batch."""
    answers = []
    for index, inputs in enumerate(prompts_one_by_one(processor)):
        sequence = generate(index, **inputs)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(sequence, skip_special_tokens=True).strip())
    return answers


def distinct(answers):
    return len(set(answers)) == len(QUESTIONS) and all(answers)


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_stock_model_answers_in_batches_as_plain_generate_row_by_row(parts, rows, batch_size):
    backbone, stock_processor, _, processor = parts
    settings = dict(max_new_tokens=NUM_NEW, do_sample=False)
    expected = answers_one_by_one(stock_processor, lambda _, **inputs: backbone.generate(**inputs, **settings))
    assert distinct(expected)
    answers = answer_questions(backbone, processor, rows, "no_latents", batch_size, NUM_NEW)
    assert answers == expected


def test_each_source_decodes_with_the_latents_it_names(parts, rows):
    _, _, model, processor = parts
    settings = dict(max_new_tokens=NUM_NEW, do_sample=False)

    def posterior_mean(index, **inputs):
        # y is the answer and what the chat template closes it with.
        completion = processor.tokenizer(GOLD[index] + "<|end|>", return_tensors="pt", add_special_tokens=False)
        return model.posterior(**inputs, completion_ids=completion["input_ids"]).mean

    references = {
        "prior": lambda _, **inputs: model.generate(**inputs, **settings, latents=model.prior(**inputs).mean),
        "posterior": lambda index, **inputs: model.generate(
            **inputs, **settings, latents=posterior_mean(index, **inputs)
        ),
        "no_latents": lambda _, **inputs: model.backbone.generate(**inputs, **settings),
    }
    assert set(references) == set(LATENT_SOURCES)
    with torch.no_grad():
        expected = {source: answers_one_by_one(processor, generate) for source, generate in references.items()}
    # Every pair of sources gives other answers in most rows, or this test could not tell them apart.
    for one in expected:
        for other in expected:
            same = sum(a == b for a, b in zip(expected[one], expected[other], strict=True))
            assert one == other or same <= 2, (one, other, expected)
    for source in LATENT_SOURCES:
        answers = answer_questions(model, processor, rows, source, batch_size=3, max_new_tokens=NUM_NEW)
        assert answers == expected[source], source
    assert answer_questions(model, processor, rows, max_new_tokens=NUM_NEW) == expected["prior"]


def test_the_answers_are_read_by_the_posterior_alone(parts, rows):
    _, _, model, processor = parts
    other = rows.map(
        lambda row: {"completion": [{"role": "assistant", "content": [{"type": "text", "text": "cyan"}]}]}
    )
    for source in LATENT_SOURCES:
        pair = [answer_questions(model, processor, which, source, max_new_tokens=NUM_NEW) for which in (rows, other)]
        assert (pair[0] == pair[1]) == (source != "posterior"), source


def test_asking_is_greedy_with_the_means_whatever_the_model_is_set_to(parts, rows):
    _, _, model, processor = parts
    model = copy.deepcopy(model)
    plain = {source: answer_questions(model, processor, rows, source, 64, NUM_NEW) for source in LATENT_SOURCES}
    model.config.latent_temperature = 1.0
    for settings in (model.generation_config, model.backbone.generation_config):
        settings.do_sample, settings.temperature = True, 5.0
    inputs = next(prompts_one_by_one(processor))
    sampled = {tuple(model.generate(**inputs, max_new_tokens=NUM_NEW)[0].tolist()) for _ in range(3)}
    assert len(sampled) > 1  # set so, the model does sample
    for source in LATENT_SOURCES:
        assert answer_questions(model, processor, rows, source, 64, NUM_NEW) == plain[source], source


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_comes_back_after_answering_in_evaluation_mode(parts, rows, training):
    _, _, model, processor = parts
    model = copy.deepcopy(model)
    modes = []
    for layer in model.backbone.model.language_model.layers:
        layer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    answer_questions(model.train(training), processor, rows, "prior", max_new_tokens=NUM_NEW)
    assert len(modes) > NUM_NEW and not any(modes)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_more_new_tokens_than_asked_for(parts, rows):
    _, _, model, processor = parts
    short, long = (answer_questions(model, processor, rows, "prior", max_new_tokens=number) for number in (1, NUM_NEW))
    assert all(b.startswith(a) for a, b in zip(short, long, strict=True))
    assert sum(map(len, long)) > sum(map(len, short))


def test_an_unknown_source_is_refused(parts, rows):
    _, _, model, processor = parts
    with pytest.raises(ValueError, match=r"`source` must be one of .*'prior', 'posterior', 'no_latents'.*'none'"):
        answer_questions(model, processor, rows, "none")


@pytest.mark.parametrize("source", ["prior", "posterior"])
def test_a_stock_model_has_no_latents_to_ask_with(parts, rows, source):
    backbone, _, _, processor = parts
    with pytest.raises(ValueError, match=f"source='{source}'.*LlavaForConditionalGeneration.*use 'no_latents'"):
        answer_questions(backbone, processor, rows, source)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def history(keys, num_steps=5):
    return [{"step": step, **{key: 1.0 + step + 3 * n for n, key in enumerate(keys)}} for step in range(num_steps)]


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def num_colorful(path):
    """Colours that are no grey: of curves, since frame, grid and letters have none."""
    colors = np.unique(pixels(path).reshape(-1, 3).astype(int), axis=0)
    return int((np.ptp(colors, axis=1) > 60).sum())


def test_the_curves_of_an_empty_history_are_empty_panels_and_those_of_a_run_are_colorful(tmp_path):
    path = plot_training_curves([], tmp_path / "new" / "empty.png")
    assert path == tmp_path / "new" / "empty.png"
    height, width, _ = pixels(path).shape
    assert 600 <= height <= 2000 and 1000 <= width <= 3000
    assert num_colorful(path) == 0 and len(np.unique(pixels(path))) > 10

    keys = [key for _, curves in PANELS for key in curves]
    path = plot_training_curves(history(keys), str(tmp_path / "run.png"), "AMVL on the embedded base")
    assert pixels(path).shape == (height, width, 3) and num_colorful(path) >= 3
    assert matplotlib.pyplot.get_fignums() == []


def test_every_curve_shows_what_was_logged_under_its_key(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    keys = [key for _, curves in PANELS for key in curves]
    logged = [{"step": 9, "train_loss": 2.0}, *history(keys[::2]), *history(keys[1::2], num_steps=3)]
    plot_training_curves(logged, tmp_path / "run.png", "A title")
    (figure,) = figures
    assert figure.get_suptitle() == "A title"
    for axis, (label, curves) in zip(figure.axes, PANELS, strict=True):
        assert axis.get_title() == label
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        assert drawn == {
            name: [[entry["step"], entry[key]] for entry in logged if key in entry] for key, name in curves.items()
        }
        assert {text.get_text() for text in axis.get_legend().get_texts()} == set(curves.values())
