"""A saved model is whole: it answers the same in a fresh process that knows nothing of this repository."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import CORE_FAMILIES, FAMILIES, SPARE_ROWS, Row, build_backbone, make_answers, make_prompts
from fresh_process import NO_REPOSITORY
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build_tiny_backbone
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_amvl import AMVLConfig, AMVLForConditionalGeneration, AMVLProcessor


REPOSITORY = Path(__file__).resolve().parents[1]
CODE = {
    "adapters_amvl.py",
    "branching_amvl.py",
    "cache_amvl.py",
    "configuration_amvl.py",
    "families_amvl.py",
    "generation_amvl.py",
    "latents_amvl.py",
    "modeling_amvl.py",
    "refusals_amvl.py",
    "sampling_amvl.py",
    "sharding_amvl.py",
}
AUTO_MODEL_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
ROWS = [Row(seed=0, num_images=2, num_words=4), Row(seed=1), Row(seed=2, num_words=3)]
NUM_NEW = 8

families = pytest.mark.parametrize("family", CORE_FAMILIES)

# argv: a JSON list of [folder or Hub id, file of prompts, folder to save to]; prints a JSON list of what was seen.
LOAD = """
import json
import torch
import transformers

seen = []
for source, prompts, target in json.loads(sys.argv[1]):
    prompts = torch.load(prompts)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    report = {"AutoConfig": f"{type(config).__module__}.{type(config).__name__}", "tokens": []}
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        model = getattr(transformers, name).from_pretrained(source, trust_remote_code=True)
        report[name] = f"{type(model).__module__}.{type(model).__name__}"
        report["tokens"].append(model.generate(**prompts, do_sample=False, max_new_tokens=8).tolist())
    report["dtype"] = str(model.dtype)
    report["settings"] = [config.num_latents, config.latent_size, config.latent_token_id, config.multipass]
    model.save_pretrained(target)
    half = transformers.AutoModelForImageTextToText.from_pretrained(
        source, trust_remote_code=True, dtype=torch.bfloat16
    )
    report["half"] = sorted({str(parameter.dtype) for parameter in half.parameters()})
    prompts = {k: v.bfloat16() if v.is_floating_point() else v for k, v in prompts.items()}
    output = half.generate(**prompts, max_new_tokens=8, return_dict_in_generate=True)
    assert output.latents.isfinite().all() and output.sequences.shape[1] > prompts["input_ids"].shape[1]
    try:
        transformers.AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        report["untrusted"] = str(error)
    seen.append(report)
print(json.dumps(seen))
"""


def run(script, cwd, *arguments, environment=None):
    """Runs a script in a process of its own and returns what its last line says in JSON."""
    environment = dict(environment or os.environ) | {
        "HF_HOME": str(cwd / "hf_home"),
        "HF_MODULES_CACHE": str(cwd / "hf_modules"),
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def offline_environment():
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def build_model(family, **settings):
    backbone = build_backbone(family)
    backbone.generation_config.eos_token_id = None  # random models end at random
    torch.manual_seed(0)
    settings = {"num_latents": 3, "latent_size": 8, "latent_token_id": SPARE_ROWS.start, **settings}
    return AMVLForConditionalGeneration.from_backbone(backbone, **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One saved model per family, by name."""
    root = tmp_path_factory.mktemp("saved")
    for family in CORE_FAMILIES:
        build_model(family, multipass="full").save_pretrained(root / family)
    return {family: root / family for family in CORE_FAMILIES}


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------


@families
def test_a_saved_model_is_its_weights_its_config_and_its_code(family, folders):
    names = {path.name for path in folders[family].iterdir()}
    assert names == CODE | {"config.json", "generation_config.json", "model.safetensors"}
    for name in CODE:
        assert (folders[family] / name).read_text() == (REPOSITORY / "modeling_amvl" / name).read_text()
    config = json.loads((folders[family] / "config.json").read_text())
    assert (
        config["model_type"] == "amvl"
        and config["backbone_config"]["model_type"] == FAMILIES[family].config.model_type
    )
    assert config["architectures"] == ["AMVLForConditionalGeneration"]
    expected = dict.fromkeys(AUTO_MODEL_CLASSES, "modeling_amvl.AMVLForConditionalGeneration")
    assert config["auto_map"] == expected | {"AutoConfig": "configuration_amvl.AMVLConfig"}


@families
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_saved_weights_load_as_a_trainer_loads_its_best_checkpoint(family, tied, tmp_path):
    backbone = build_backbone(family)
    if tied:
        backbone.config.tie_word_embeddings = True
        backbone.tie_weights()
    model = AMVLForConditionalGeneration.from_backbone(backbone, num_latents=3, latent_size=8)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == [] and missing == (["backbone.lm_head.weight"] if tied else [])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert (
        AMVLForConditionalGeneration.from_pretrained(tmp_path).config.latent_token_id == model.config.latent_token_id
    )


@families
def test_loading_gives_back_every_weight_and_setting(family, tmp_path):
    settings = {"min_log_variance": -6.0, "max_log_variance": 2.0, "latent_temperature": 0.5, "multipass": "shared"}
    model = build_model(family, **settings)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AMVLForConditionalGeneration.from_pretrained(tmp_path)
    assert all(getattr(again.config, name) == value for name, value in settings.items())
    assert again.prior_head.min_log_variance == -6.0 and again.posterior_head.max_log_variance == 2.0
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    prompts, answers = make_prompts(family, ROWS), make_answers((3, 1, 2))
    outputs = [which(**prompts, **answers, latent_temperature=0.0) for which in (model.eval(), again.eval())]
    assert all(torch.equal(*pair) for pair in zip(*(output.values() for output in outputs), strict=True))


def test_a_table_that_grew_comes_back_grown(tmp_path):
    model = build_model("llava", latent_token_id=None)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is AMVLForConditionalGeneration and again.config.latent_token_id == 160
    assert again.get_input_embeddings().weight.shape[0] == 192


def test_what_generate_was_set_to_is_saved(tmp_path):
    model = build_model("llava")
    model.generation_config.max_new_tokens = 2
    model.save_pretrained(tmp_path)
    prompts = make_prompts("llava", ROWS)
    again = AMVLForConditionalGeneration.from_pretrained(tmp_path)
    for generate in (again.generate, again.backbone.generate):  # with latents, and off
        assert generate(**prompts).shape[1] == prompts["input_ids"].shape[1] + 2


def test_a_setting_changed_on_a_live_model_is_saved(tmp_path):
    model = build_model("llava")
    model.config.latent_temperature, model.config.multipass = 0.7, "full"
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is AMVLConfig and (config.latent_temperature, config.multipass) == (0.7, "full")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@families
def test_the_checkpoint_of_a_stock_model_is_refused(family, tmp_path):
    build_backbone(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds a `{family}` model, not an `amvl` one: wrap it with"):
        AMVLForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not an `amvl` one|must be `amvl`"):
        AMVLForConditionalGeneration.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("part", ["prior_head.", "posterior_head.", "latent_projection."])
def test_a_checkpoint_without_the_weights_of_a_latent_part_is_refused(part, folders, tmp_path):
    weights = load_file(folders["llava"] / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(part)}
    assert len(kept) < len(weights)
    (tmp_path / "config.json").write_text((folders["llava"] / "config.json").read_text())
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"has no fitting weights for \['{part}.*would be random"):
        AMVLForConditionalGeneration.from_pretrained(tmp_path)


def test_weights_that_are_not_safetensors_are_refused(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders["llava"] / "config.json").read_text())
    torch.save(load_file(folders["llava"] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AMVLForConditionalGeneration.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# In a fresh process, as remote code
# ---------------------------------------------------------------------------------------------------------------------


def greedy(folder, prompts):
    model = AMVLForConditionalGeneration.from_pretrained(folder)
    return model.generate(**prompts, do_sample=False, max_new_tokens=NUM_NEW).tolist()


def assert_loaded(report, tokens):
    assert report["AutoConfig"].startswith("transformers_modules.")
    assert report["AutoConfig"].endswith(".configuration_amvl.AMVLConfig")
    for name in AUTO_MODEL_CLASSES:
        assert report[name].startswith("transformers_modules.")
        assert report[name].endswith(".modeling_amvl.AMVLForConditionalGeneration")
    assert report["tokens"] == [tokens] * 3
    assert (report["dtype"], report["half"]) == ("torch.float32", ["torch.bfloat16"])
    assert "trust_remote_code" in report["untrusted"]


@pytest.mark.slow
def test_a_fresh_process_gives_token_for_token_the_same_also_from_what_it_saved_itself(folders, tmp_path):
    requests, expected = [], []
    for family, folder in folders.items():
        prompts = make_prompts(family, ROWS)
        torch.save(prompts, tmp_path / f"{family}.pt")
        requests.append([str(folder), str(tmp_path / f"{family}.pt"), str(tmp_path / f"again_{family}")])
        expected.append(greedy(folder, prompts))
    for generation in ("first", "second"):
        cwd = tmp_path / generation
        cwd.mkdir()
        reports = run(NO_REPOSITORY + LOAD, cwd, json.dumps(requests), environment=offline_environment())
        for report, tokens in zip(reports, expected, strict=True):
            assert_loaded(report, tokens)
            assert report["settings"] == [3, 8, SPARE_ROWS.start, "full"]
        for request in requests:  # the second process loads what the first one saved
            assert {path.name for path in Path(request[2]).iterdir()} > CODE
            request[0], request[2] = request[2], request[2] + "_again"


# ---------------------------------------------------------------------------------------------------------------------
# With a processor: the Hub and the pipeline
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_with_processor(tmp_path_factory):
    """The embedded default's tiny LLaVA and its processor, and a photo."""
    folder = tmp_path_factory.mktemp("with_processor")
    backbone, processor = build_tiny_backbone()
    backbone.generation_config.eos_token_id = None
    processor = AMVLProcessor.from_backbone(processor)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=3, latent_size=8, latent_token_id=processor.latent_token_id
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(folder / "photo.png")
    return folder


def messages(photo):
    content = [{"type": "image", "image": photo}, {"type": "text", "text": "What colour is the circle?"}]
    return [{"role": "user", "content": content}]


def ask(model, processor, photo):
    inputs = processor.apply_chat_template(
        messages(photo), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]


ASK = inspect.getsource(messages) + inspect.getsource(ask)  # the same lines here and in the fresh processes

# argv: folder, photo
PUSH = """
import json
import sys
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor

AMVLForConditionalGeneration.from_pretrained(sys.argv[1]).push_to_hub("someone/amvl")
AMVLProcessor.from_pretrained(sys.argv[1]).push_to_hub("someone/amvl")
print(json.dumps("pushed"))
"""

# argv: folder or Hub id, photo, Hub id to push to
ANSWER = """
import json
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

source, photo, target = sys.argv[1:]
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
assert type(model).__name__ == "AMVLForConditionalGeneration" and type(processor).__name__ == "AMVLProcessor"
assert type(model).__module__.startswith("transformers_modules.")
tokens = ask(model, processor, Image.open(photo)).tolist()
if target:
    model.push_to_hub(target)
    processor.push_to_hub(target)
    print(json.dumps({"tokens": tokens}))
else:
    pipe = pipeline("image-text-to-text", model=source, trust_remote_code=True)
    assert type(pipe.model).__name__ == "AMVLForConditionalGeneration"
    settings = {"max_new_tokens": 8, "do_sample": False}
    answer = pipe(text=messages(Image.open(photo)), return_full_text=False, generate_kwargs=settings)
    chats, several = [messages(Image.open(photo))] * 2, {"num_latent_samples": 3, "latent_temperature": 100.0}
    samples = pipe(text=chats, batch_size=2, return_full_text=False, generate_kwargs=settings | several)
    text = processor.batch_decode(tokens, skip_special_tokens=True)[0]
    report = {"tokens": tokens, "text": text, "pipeline": answer[0]["generated_text"]}
    report |= {"samples": [[record["generated_text"] for record in records] for records in samples]}
    report |= {"majority": processor.majority(["Two.", "one", "two"])}
    print(json.dumps(report))
"""


def answer_here(folder):
    model = AMVLForConditionalGeneration.from_pretrained(folder / "model")
    processor = AMVLProcessor.from_pretrained(folder / "model")
    return ask(model, processor, Image.open(folder / "photo.png")).tolist()


@pytest.mark.slow
def test_the_pipeline_answers_in_a_fresh_process(folder_with_processor, tmp_path):
    folder = folder_with_processor
    arguments = folder / "model", folder / "photo.png", ""
    report = run(NO_REPOSITORY + ASK + ANSWER, tmp_path, *arguments, environment=offline_environment())
    assert report["tokens"] == answer_here(folder)
    assert report["pipeline"] == report["text"] != ""
    first, second = report["samples"]
    assert first == second and len(set(first)) > 1  # of a prompt, wherever it stands in the batch
    assert report["majority"] == ["Two.", 2 / 3]


@pytest.mark.slow
def test_a_pushed_model_answers_the_same_also_after_it_was_pushed_on_from_remote_code(folder_with_processor, tmp_path):
    folder = folder_with_processor
    expected = answer_here(folder)
    with LoopbackHub() as hub:
        for name in ("pusher", "friend", "friends_friend"):
            (tmp_path / name).mkdir()
        pusher = hub.environment(tmp_path) | {"PYTHONPATH": str(REPOSITORY)}
        assert run(PUSH, tmp_path / "pusher", folder / "model", environment=pusher) == "pushed"
        files = hub.models["someone/amvl"].files
        assert files["model.safetensors"].lfs and CODE | {"processing_amvl.py"} < files.keys()
        stranger = {key: value for key, value in hub.environment(tmp_path).items() if key != "PYTHONPATH"}
        for name, source, target in (
            ("friend", "someone/amvl", "friend/amvl"),
            ("friends_friend", "friend/amvl", "nobody/amvl"),
        ):
            arguments = source, folder / "photo.png", target
            script = NO_REPOSITORY + ASK + ANSWER
            assert run(script, tmp_path / name, *arguments, environment=stranger)["tokens"] == expected
        pushed_on = hub.models["friend/amvl"].files
        for name in (*CODE, "processing_amvl.py", "model.safetensors"):
            assert pushed_on[name].data == files[name].data, name


def test_a_model_taken_by_name_uses_the_row_that_its_processor_uses(tmp_path):
    backbone, processor = build_tiny_backbone()
    backbone.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = AMVLForConditionalGeneration.from_backbone(tmp_path, num_latents=2, latent_size=8)
    assert model.config.latent_token_id == AMVLProcessor.from_backbone(tmp_path).latent_token_id
    assert model.get_input_embeddings().weight.shape == backbone.get_input_embeddings().weight.shape
