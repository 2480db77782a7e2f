"""lmms-eval asks AMVL as the model itself would be asked: its real command on a tiny task in BLINK's columns."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_tiny_backbone

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor


# Before the plug-in, as its command does: the registry is filled when lmms-eval's models are imported.
models = pytest.importorskip("lmms_eval.models", reason="lmms-eval is not installed: the extra `lmms-eval`")

from lmms_eval.api.instance import Instance  # noqa: E402

from trainer.lmms_eval_plugin import AMVL, generation_settings  # noqa: E402


NUM_NEW, NUM_LATENTS = 6, 4
QUESTIONS = (  # prompts of different lengths: a batch of them is padded
    ("What color is the shape?", 1),
    ("How many red shapes are there at the top left, at the center and at the bottom right?", 2),
    ("Which corner does not belong to the photo?", 1),
    ("Where is the red shape?", 3),
    ("color", 1),
)
TASK = """\
include: {blink}
task: tiny_blink
dataset_path: parquet
dataset_kwargs: {{data_files: {{val: rows.parquet}}}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: ""}}}}
process_results: !function tiny_blink.process_results
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{max_new_tokens: {num_new}, temperature: 0, until: [{until!r}], image_aspect_ratio: original}}
"""
SCORING = "def process_results(doc, results):\n    return {'exact': float(results[0] == doc['answer'])}\n"


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    rows = []
    for index, (question, num_images) in enumerate(QUESTIONS):
        images = [Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(num_images)]
        images += [None] * (4 - num_images)
        row = {"idx": f"val_Tiny_{index}", "question": question, "sub_task": "Tiny", "choices": ["left", "right"]}
        rows.append(row | {f"image_{n + 1}": image for n, image in enumerate(images)} | {"prompt": question})
    return rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, rows):
    """Folder of an AMVL checkpoint whose latents count and of a stock model; model and processor of the first."""
    folder = tmp_path_factory.mktemp("checkpoints")
    backbone, stock_processor = build_tiny_backbone(seed=0)
    processor = AMVLProcessor.from_backbone(stock_processor)
    torch.manual_seed(1)
    model = AMVLForConditionalGeneration.from_backbone(
        copy.deepcopy(backbone), num_latents=NUM_LATENTS, latent_size=16, latent_token_id=processor.latent_token_id
    )
    with torch.no_grad():  # latents start as large as one token
        for parameter in model.prior_head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.latent_projection.weight.mul_(8)
    settings = (backbone.generation_config, model.generation_config, model.backbone.generation_config)
    for setting in settings:
        setting.eos_token_id = None
    pairs = ((model, rows[1]), (model.backbone, rows[4]))  # their answers have two tokens
    eos = [ask_alone(asked, processor, row)[1][2].item() for asked, row in pairs]
    for setting in settings:
        setting.eos_token_id = eos
    backbone.save_pretrained(folder / "stock")
    stock_processor.save_pretrained(folder / "stock")
    model.save_pretrained(folder / "amvl")
    processor.save_pretrained(folder / "amvl")
    return folder, model, processor


def ask_alone(model, processor, row, **settings):
    """Ids of the prompt of a row and of its answer without the token that ends it, by plain `generate`."""
    content = [{"type": "image", "image": row[f"image_{n}"]} for n in range(1, 5) if row[f"image_{n}"]]
    content.append({"type": "text", "text": row["prompt"]})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    sequence = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, **settings)[0]
    prompt, answer = sequence.tensor_split([inputs["input_ids"].shape[1]])
    eos = model.generation_config.eos_token_id
    return prompt, answer[:-1] if eos and answer[-1] in eos else answer


def ask_each_alone(model, processor, rows, **settings):
    """The reference: answers, and the number of tokens of each prompt and answer."""
    pairs = [ask_alone(model, processor, row, **settings) for row in rows]
    texts = [processor.decode(answer, skip_special_tokens=True).strip() for _, answer in pairs]
    return texts, [(len(prompt), len(answer)) for prompt, answer in pairs]


def requests(rows, **settings):
    """What lmms-eval gives to the model, and the documents that it looks up."""
    from lmms_eval.tasks.blink.utils import blink_doc_to_messages

    documents = {"tiny_blink": {"val": rows}}
    metadata = {"task": "tiny_blink", "repeats": 1, "split": "val"}
    instances = [
        Instance(
            request_type="generate_until",
            arguments=(row["prompt"], blink_doc_to_messages, dict(settings), index, "tiny_blink", "val"),
            idx=0,
            metadata=metadata | {"doc_id": index},
        )
        for index, row in enumerate(rows)
    ]
    return documents, instances


def test_the_real_command_gives_the_answers_scores_and_token_counts_of_direct_generation(checkpoint, rows, tmp_path):
    folder, model, processor = checkpoint
    whole, _ = ask_each_alone(model, processor, rows)
    until = whole[2][2:4]  # across two tokens
    _, lengths = ask_each_alone(model, processor, rows, stop_strings=[until], tokenizer=processor.tokenizer)
    assert lengths[0][1] == NUM_NEW > lengths[2][1] > lengths[1][1]  # whole, stopped, ended
    expected = [answer.split(until)[0].strip() for answer in whole]
    assert expected[2] == whole[2][:2] and all(expected) and len(set(expected)) == len(rows)
    gold = ["something else", *expected[1:3], *["something else"] * (len(rows) - 3)]

    task = tmp_path / "task"
    task.mkdir()
    columns = datasets.Features(
        {key: datasets.Value("string") for key in ("idx", "question", "sub_task", "prompt", "answer")}
        | {"choices": datasets.List(datasets.Value("string"))}
        | {f"image_{n}": datasets.Image() for n in range(1, 5)}
    )
    answered = [row | {"answer": answer} for row, answer in zip(rows, gold, strict=True)]
    datasets.Dataset.from_list(answered, features=columns).to_parquet(task / "rows.parquet")
    blink = Path(models.__file__).parents[1] / "tasks" / "blink" / "_default_template_yaml"
    (task / "tiny_blink.yaml").write_text(TASK.format(blink=blink, num_new=NUM_NEW, until=until))
    (task / "tiny_blink.py").write_text(SCORING)

    command = [sys.executable, "-m", "lmms_eval", "--model", "amvl", "--tasks", "tiny_blink"]
    command += ["--include_path", str(task)]
    command += ["--model_args", f"pretrained={folder / 'amvl'}", "--batch_size", "3", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    print(finished.stdout, finished.stderr)
    assert finished.returncode == 0

    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["tiny_blink"]["exact,none"] == pytest.approx(2 / 5)
    (samples,) = (tmp_path / "out").rglob("*_samples_tiny_blink.jsonl")
    samples = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    counts = [sample["token_counts"][0] for sample in samples]
    assert [sample["filtered_resps"].strip() for sample in samples] == expected
    assert [(count["input_tokens"], count["output_tokens"]) for count in counts] == lengths
    assert [count["reasoning_tokens"] for count in counts] == [NUM_LATENTS] * len(rows)


def test_every_source_is_the_model_it_names_and_the_temperature_reaches_the_latents(checkpoint, rows):
    folder, model, processor = checkpoint
    documents, instances = requests(rows, max_new_tokens=NUM_NEW)

    def ask(name, **settings):
        plugin = AMVL(str(folder / name), batch_size="2", device="cpu", **settings)
        plugin.task_dict = documents
        results = plugin.generate_until(instances)
        assert {result.token_counts.reasoning_tokens for result in results} == {plugin.num_latents}
        counts = [(result.token_counts.input_tokens, result.token_counts.output_tokens) for result in results]
        return [result.text.strip() for result in results], counts

    prior = ask_each_alone(model, processor, rows)
    backbone = ask_each_alone(model.backbone, processor, rows)
    assert prior[0] != backbone[0] and prior[1][1][1] == backbone[1][4][1] == 2
    assert ask("amvl") == ask("amvl", latent_temperature=0) == prior
    assert ask("amvl", source="no_latents") == ask("stock", source="no_latents") == backbone
    torch.manual_seed(0)
    assert ask("amvl", latent_temperature=30) != prior


def test_what_would_make_the_latents_do_nothing_is_refused(checkpoint, rows):
    amvl, stock = (str(checkpoint[0] / name) for name in ("amvl", "stock"))
    with pytest.raises(ValueError, match="`pretrained=.*stock` is no AMVL checkpoint.*`source=no_latents`"):
        AMVL(stock)
    with pytest.raises(ValueError, match="`latent_temperature=1` does nothing with `source=no_latents`"):
        AMVL(amvl, source="no_latents", latent_temperature=1)
    with pytest.raises(ValueError, match="`source` must be 'prior' or 'no_latents', got 'posterior'"):
        AMVL(amvl, source="posterior")
    with pytest.raises(ValueError, match="`latent_temperature` must be a number from 0 on, got -1"):
        AMVL(amvl, latent_temperature=-1)
    with pytest.raises(ValueError, match="`batch_size` must be a positive number, got 'auto'"):
        AMVL(amvl, batch_size="auto")
    plugin = AMVL(amvl, device="cpu")
    plugin.task_dict, instances = requests(rows, use_cache=False)
    with pytest.raises(ValueError, match="`use_cache=False` does not go with latents"):
        plugin.generate_until(instances)


def test_a_task_decides_whether_to_sample_and_where_to_stop():
    assert generation_settings({"until": ["\n\n"]}) == ({"max_new_tokens": 1024, "do_sample": False}, [])
    settings = {"temperature": 0.0, "do_sample": True, "top_p": None, "until": ["Q:", "\n\n"], "max_new_tokens": 8}
    assert generation_settings(settings) == ({"max_new_tokens": 8, "do_sample": False}, ["Q:"])
    settings = {"temperature": 0.7, "until": "Q:", "visual_cot": True, "max_new_tokens": 8}
    assert generation_settings(settings) == ({"max_new_tokens": 8, "temperature": 0.7, "do_sample": True}, ["Q:"])
