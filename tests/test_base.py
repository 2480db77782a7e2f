"""The base that ships with the package: small, of stock classes, and it sees."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from trainer.base import EMBEDDED, KINDS, add_latents, build_base, load_base
from trainer.data.color_steps import CAPTIONS, MULTI_HOP, build_color_steps
from trainer.evaluation import accuracy_by_kind, answer_questions, answer_text


@pytest.fixture(scope="module")
def base():
    return load_base()


def test_it_is_small_enough_to_ship_and_of_stock_classes(base):
    model, processor = base
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 12e6
    assert type(model).__module__.startswith("transformers.") and type(processor).__module__.startswith(
        "transformers."
    )
    built, _ = build_base()
    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        name: weight.shape for name, weight in built.state_dict().items()
    }


def test_it_recognises_counts_and_locates_and_cannot_take_two_steps(base):
    """Other rows than its card's: another seed."""
    model, processor = base
    kinds = ("list_colors", "walk", "color", "shape", "counting", "location", "1_step", "2_steps")
    rows = build_color_steps(40 * len(kinds), "held_out", seed=17, kinds=kinds)
    answers = answer_questions(model, processor, rows, "no_latents")
    found = accuracy_by_kind(answers, [answer_text(row) for row in rows.remove_columns("images")], rows["kind"])
    assert min(found[kind] for kind in ("list_colors", "walk", "color", "shape", "1_step")) > 0.95, found
    assert min(found["counting"], found["location"]) > 0.6, found
    assert found["2_steps"] < 0.1, found


def test_its_card_is_valid_and_says_what_was_measured():
    card = ModelCard.load(EMBEDDED / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-text-to-text"
    results = json.loads((EMBEDDED / "results.json").read_text())
    for kind in (*KINDS, *MULTI_HOP):
        cells = [f"{100 * results[column][kind]:.1f}" for column in ("chance", "constant", "base")]
        (row,) = [line for line in card.text.splitlines() if line.startswith(f"| {kind} ")]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == cells
    assert all(results["chance"][kind] == 0 for kind in CAPTIONS)


def test_with_latents_the_placeholder_starts_as_the_assistants_header(base):
    model, processor = add_latents(3, 16)
    embeddings, stock = model.get_input_embeddings().weight, base[0].get_input_embeddings().weight
    header = base[1].tokenizer.convert_tokens_to_ids("<|assistant|>")
    latent = model.config.latent_token_id
    assert latent == processor.latent_token_id and torch.equal(embeddings[latent], stock[header])
    others = torch.arange(len(stock)) != latent
    assert torch.equal(embeddings[others], stock[others])
    cold, _ = add_latents(3, 16, initial_token_id=None)
    assert torch.equal(cold.get_input_embeddings().weight, stock)
