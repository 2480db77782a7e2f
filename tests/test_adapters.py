"""An adapter trains and saves the latents whole, goes back on its base and on no other, and merges into the same model."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from fresh_process import NO_REPOSITORY
from huggingface_hub import ModelCard
from loopback_hub import TOKEN
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_hub import ASK, REPOSITORY, client, hub  # noqa: F401
from tiny import build_tiny_backbone
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlavaForConditionalGeneration

from model_cards import read_facts, render_card
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLDataCollator, AMVLSFTConfig, AMVLSFTTrainer
from trainer.adapters import LATENT_MODULES, merge_adapter, prepare_peft_config, settle_adapter
from trainer.base import base_words
from trainer.data.color_steps import build_color_steps
from trainer.tiny_llava import build_llava


TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with a stock model and its processor; the table is tied to the output layer."""
    folder = tmp_path_factory.mktemp("stock")
    for part in build_tiny_backbone():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(stock):
    return AMVLProcessor.from_backbone(str(stock))


@pytest.fixture(scope="module")
def rows():
    return build_color_steps(8, image_size=48)


@pytest.fixture
def make_model(stock, processor):
    def make(warm=True, **settings):
        torch.manual_seed(0)
        settings = {"num_latents": 2, "latent_size": 8, "latent_token_id": processor.latent_token_id, **settings}
        settings |= {"initial_token_id": processor.answer_start_id} if warm else {}
        return AMVLForConditionalGeneration.from_backbone(str(stock), **settings)

    return make


@pytest.fixture
def make_trainer(make_model, processor, rows, tmp_path):
    def make(peft_config=None, model=None, folder="run", **settings):
        defaults = {
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "training_summary": False,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "max_steps": 2,
            "self_test": False,
            "kl_warmup_steps": 0,
            "kl_delay_steps": 0,
        }
        return AMVLSFTTrainer(
            make_model() if model is None else model,
            AMVLSFTConfig(str(tmp_path / folder), **{**defaults, **settings}),
            train_dataset=rows,
            processing_class=processor,
            peft_config=peft_config,
        )

    return make


@pytest.fixture
def train(make_trainer):
    """Trains and saves; returns the trainer, and the names of parameters that were to be trained and have not moved."""

    def run(*args, **settings):
        trainer = make_trainer(*args, **settings)
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        trainer.train()
        trainer.save_model()
        now = dict(trainer.model.named_parameters())
        return trainer, [name for name in trained if torch.equal(before[name], now[name])]

    return run


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})


def numbers(model, processor, rows):
    """All that a model says of some rows, the placeholder's own logit included."""
    batch = AMVLDataCollator(processor)([rows[index] for index in range(4)])
    with torch.no_grad():
        output = model.eval()(**batch, latent_temperature=0.0, decode_prior=True)
    return torch.cat([output[key].float().flatten() for key in ("logits", "prior_logits", "prior_mean")])


def tokens(model, processor, rows):
    answers = []
    for row in rows:
        inputs = processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": row["images"][0]}, row["prompt"][0]["content"][-1]],
                }
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        answer = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)
        answers.append(answer[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "all-linear": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "one layer": {"layers_to_transform": [0]},
    "regex": {"target_modules": r".*language_model.*\.(q|v)_proj", "exclude_modules": ".*v_proj"},
    "more saved": {"modules_to_save": ["multi_modal_projector"], "trainable_token_indices": [3]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_row_are_trained_saved_and_go_back_on_a_cold_base_and_merge(
    kind, train, make_model, processor, rows, tmp_path
):
    config = lora(**KINDS[kind])
    asked = config.to_dict()
    trainer, unmoved = train(config)
    assert unmoved == [] and config.to_dict() == asked  # the user's own is left alone
    folder = Path(trainer.args.output_dir)
    saved, inner = load_file(folder / "adapter_model.safetensors"), trainer.model.get_base_model()
    for part in LATENT_MODULES:
        for name, parameter in getattr(inner, part).modules_to_save["default"].named_parameters():
            assert torch.equal(saved.pop(f"base_model.model.{part}.{name}"), parameter)
    (row,) = (value for key, value in saved.items() if "trainable_tokens_delta" in key)
    assert not torch.equal(row[-1], make_model().get_input_embeddings().weight[processor.latent_token_id])

    expected, said = numbers(trainer.model, processor, rows), tokens(inner, processor, rows)
    assert (numbers(make_model(), processor, rows) - expected).abs().max() > 0.1  # training did something
    adapted = PeftModel.from_pretrained(make_model(warm=False), folder)
    torch.testing.assert_close(numbers(adapted, processor, rows), expected, rtol=0, atol=1e-6)
    by_name = AMVLForConditionalGeneration.from_pretrained(folder)
    torch.testing.assert_close(numbers(by_name, processor, rows), expected, rtol=0, atol=1e-6)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(numbers(merged, processor, rows), expected, rtol=0, atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AMVLForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(numbers(loaded, processor, rows), expected, rtol=0, atol=2e-5)
    for model in (by_name, merged, loaded):
        assert tokens(model, processor, rows) == said
        assert processor.latent_token_id in model.generation_config.suppress_tokens


def test_in_bf16_what_is_trained_whole_is_trained_in_fp32(make_trainer, make_model):
    trainer = make_trainer(lora(), model=make_model(dtype=torch.bfloat16))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert trainer.model.get_base_model().backbone.dtype == torch.bfloat16


def test_an_adapter_goes_on_being_trained(train, make_model, processor, rows):
    first, _ = train(lora(), folder="first")
    model = PeftModel.from_pretrained(make_model(warm=False), first.args.output_dir, is_trainable=True)
    second, unmoved = train(model=model, folder="second")
    assert unmoved == []
    loaded = AMVLForConditionalGeneration.from_pretrained(second.args.output_dir)
    expected = numbers(second.model, processor, rows)
    torch.testing.assert_close(numbers(loaded, processor, rows), expected, rtol=0, atol=1e-6)


def test_an_adapter_of_a_trained_amvl_model_goes_back_on_that(train, processor, rows, tmp_path):
    first, _ = train(lora(), folder="first")
    merge_adapter(first.args.output_dir, tmp_path / "merged")
    base = AMVLForConditionalGeneration.from_pretrained(tmp_path / "merged")
    second, _ = train(lora(), model=base, folder="second")
    assert second.model.peft_config["default"].base_model_name_or_path == str(tmp_path / "merged")
    expected = numbers(second.model, processor, rows)
    for name in (second.args.output_dir, merge_again(second, tmp_path)):
        loaded = AMVLForConditionalGeneration.from_pretrained(name)
        torch.testing.assert_close(numbers(loaded, processor, rows), expected, rtol=0, atol=2e-5)


def merge_again(trainer, tmp_path):
    merge_adapter(trainer.args.output_dir, tmp_path / "merged again")
    return tmp_path / "merged again"


def test_the_base_that_the_card_builds_is_the_one_it_was_trained_on(train, make_model, stock, processor, rows):
    model = make_model(min_log_variance=-1.5, max_log_variance=-0.5)
    trainer, _ = train(lora(), model=model)
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    code = card.split("```python\n")[2].split("```")[0]
    assert "revision" not in code and code.count('"...",  # the folder of its backbone') == 1
    scope = {}
    exec(code.replace('"..."', repr(str(stock))), scope)
    adapted = PeftModel.from_pretrained(scope["base"], trainer.args.output_dir)
    expected = numbers(trainer.model, processor, rows)
    torch.testing.assert_close(numbers(adapted, processor, rows), expected, rtol=0, atol=1e-6)
    facts = dataclasses.replace(read_facts(trainer.args.output_dir), base="someone/stock", base_revision="abc")
    card = render_card(facts).text
    assert '    "someone/stock",\n    revision="abc",\n    num_latents=2,\n' in card


def test_where_the_row_cannot_be_carried_the_base_has_to_start_it_alike(make_model, caplog):
    def adapted(warm):
        model = make_model(warm)
        table = model.get_input_embeddings()
        table.__class__ = type(
            "NormedEmbedding", (type(table),), {"forward": lambda self, ids: super(type(self), self).forward(ids)}
        )
        config = prepare_peft_config(lora(), model)
        assert config.trainable_token_indices is None
        return get_peft_model(model, config)

    model = adapted(warm=True)
    settle_adapter(model)
    assert "does not carry the row of `<latent>`" in caplog.text
    settled = model.peft_config["default"]
    with pytest.raises(
        ValueError, match=f"`initial_token_id` is {model.get_base_model().config.initial_token_id} there and None"
    ):
        get_peft_model(make_model(warm=False), settled)
    get_peft_model(make_model(warm=True), settled)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(train):
    return Path(train(lora(), folder="adapter")[0].args.output_dir)


OTHERS = {
    "num_latents": 3,
    "latent_size": 4,
    "latent_token_id": 420,
    "min_log_variance": -7.0,
    "max_log_variance": 3.0,
}


def test_another_base_is_refused_by_what_differs(adapter, make_model, stock):
    for setting, value in OTHERS.items():
        with pytest.raises(
            ValueError, match=f"trained around another model: `{setting}` is .* there and {value} here"
        ):
            PeftModel.from_pretrained(make_model(**{setting: value}), adapter)
    backbone, _ = build_llava(base_words(), 48, 16, text_size=64)
    narrow = AMVLForConditionalGeneration.from_backbone(backbone, num_latents=2, latent_size=8, latent_token_id=418)
    with pytest.raises(ValueError, match="`hidden_size` is 96 there and 64 here"):
        PeftModel.from_pretrained(narrow, adapter)
    first = PeftModel.from_pretrained(make_model(), adapter)
    other = json.loads((adapter / "adapter_config.json").read_text().replace("num_latents=2", "num_latents=3"))
    (adapter / "adapter_config.json").write_text(json.dumps(other))
    first.load_adapter(adapter, "other")
    with pytest.raises(ValueError, match="The adapter `other` was trained around another model: `num_latents`"):
        first.get_base_model().generate(input_ids=torch.ones(1, 3, dtype=torch.long))
    # A stock model, whose latents nobody would miss.
    with pytest.raises(ValueError, match="a stock model has no latents.*not found in the base model"):
        PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(stock), adapter)
    (adapter / "config.json").unlink()
    with pytest.raises(ValueError, match="a stock model has no latents.*not found in the base model"):
        AutoModelForImageTextToText.from_pretrained(adapter, trust_remote_code=True)
    with pytest.raises(ValueError, match="adapter without the config.json"):
        AMVLForConditionalGeneration.from_pretrained(adapter)


def test_an_adapter_without_a_head_is_not_loaded(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "prior_head.mean.weight" not in k}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="not whole: .*prior_head"):
        AMVLForConditionalGeneration.from_pretrained(adapter)


def test_a_base_that_is_not_where_it_was_is_named(adapter, stock, tmp_path):
    moved = tmp_path / "moved"
    for take in (stock, stock / "model.safetensors"):
        take.rename(moved)
        try:
            with pytest.raises(OSError, match=f"The base of the adapter `{adapter}` cannot be loaded from `{stock}`"):
                AMVLForConditionalGeneration.from_pretrained(adapter)
        finally:
            moved.rename(take)


def test_an_adapter_that_was_cut_is_named(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"The adapter `{adapter}` is not whole"):
        AMVLForConditionalGeneration.from_pretrained(adapter)


REFUSED = {
    "inference_mode": (lora(inference_mode=True), "`inference_mode=True`"),
    "vision": (lora(target_modules=["fc1"]), "[Nn]o modules were targeted|adapts nothing in the language model"),
    "projector": (lora(target_modules=["linear_1"]), "adapts nothing in the language model, `LlamaModel`"),
    "nothing": (lora(target_modules=["nothing"]), "[Nn]o modules were targeted|not found"),
    "excluded": (lora(exclude_modules=r".*\.language_model\..*"), "[Nn]o modules were targeted|adapts nothing"),
    "task": (lora(task_type="SEQ_CLS"), "`task_type` .* is 'SEQ_CLS'"),
    "init": (lora(init_lora_weights="pissa_niter_4"), "`init_lora_weights` .* is 'pissa_niter_4'"),
    "inside a head": (lora(modules_to_save=["norm"]), "`modules_to_save` has 'norm', which fits `prior_head.norm`"),
    "table": (lora(target_modules=["embed_tokens", "q_proj"]), "the embedding table, whose row"),
    "tied table": (
        lora(modules_to_save=["embed_tokens"]),
        "the embedding table, whose weights are the output layer's",
    ),
    "tied head": (
        lora(modules_to_save=["lm_head"]),
        "'lm_head', the output layer, whose weights are the embedding table's",
    ),
    "aLoRA": (
        lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        r"`alora_invocation_tokens` .* is \[5, 6\]",
    ),
    "no alpha": (lora(lora_alpha=0), "`lora_alpha` of `peft_config` is 0"),
    "no alpha of some": (lora(alpha_pattern={"q_proj": 0}), "'q_proj': 0"),
    "all dropped": (lora(lora_dropout=1.0), "`lora_dropout` of `peft_config` is 1.0"),
    "bias to nowhere": (
        lora(lora_bias=True),
        r"`lora_bias=True` of the adapter `default`, but `.*q_proj` has no bias",
    ),
    "vision biases": (lora(bias="all"), "`freeze_vision=True`, but the adapter trains"),
    "IA3": (IA3Config(target_modules=TARGETS, feedforward_modules=[]), "is a `IA3Config`"),
    "AdaLoRA": (AdaLoraConfig(target_modules=TARGETS, total_step=9), "is a `AdaLoraConfig`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_would_leave_the_latents_out_are_refused(name, make_trainer):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(config)


def peft_model(model, **settings):
    return get_peft_model(model, lora(**{"modules_to_save": sorted(LATENT_MODULES), **settings}))


def with_another_active(model):
    model = peft_model(model)
    model.add_adapter("other", lora())
    model.set_adapter("other")
    return model


def disabled(model):
    model = peft_model(model)
    model.disable_adapter_layers()
    return model


def merged_in_place(model):
    model = peft_model(model)
    model.merge_adapter()
    return model


STATES = {
    "another active": (with_another_active, "`prior_head` is frozen or not saved with the adapter `other`"),
    "disabled": (disabled, "`default` is disabled"),
    "merged": (merged_in_place, "`default` is merged"),
    "inference": (lambda model: peft_model(model, inference_mode=True), "`is_trainable=True`"),
    "vision only": (
        lambda model: peft_model(model, target_modules=["fc1"]),
        "`target_modules` of the adapter `default` adapts nothing in the language model",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_peft_model_that_would_not_train_the_latents_is_refused(name, make_trainer, make_model):
    make, message = STATES[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(model=make(make_model()))


def test_a_model_that_was_loaded_with_its_adapter_is_not_trained_frozen(adapter, make_trainer):
    for config in (None, lora()):
        with pytest.raises(ValueError, match="`model` was loaded with an adapter on it, which is frozen"):
            make_trainer(config, model=AMVLForConditionalGeneration.from_pretrained(adapter))


# ---------------------------------------------------------------------------------------------------------------------
# QLoRA, where bitsandbytes is installed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["nf4", "int8"])
def quantised(request, tmp_path):
    """Settings for a base that is loaded quantised, and the class of its linear layers."""
    pytest.importorskip("bitsandbytes")
    if request.param == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        return BitsAndBytesConfig(**settings), "Linear4bit"
    return BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt"


@pytest.fixture
def stock_128(stock):
    """bitsandbytes packs blocks of 64 numbers on a CPU."""
    for part in build_llava(base_words(), 48, 16, vision_size=64, text_size=128):
        part.save_pretrained(stock)
    yield stock
    for part in build_tiny_backbone():
        part.save_pretrained(stock)


def test_qlora_trains_the_latents_in_fp32_and_merges_into_what_it_was_trained_on(
    quantised, stock_128, train, make_trainer, make_model, processor, rows, tmp_path
):
    quantization_config, linear = quantised
    settings = {"quantization_config": quantization_config}
    with pytest.raises(ValueError, match="purely quantized"):
        make_trainer(model=make_model(**settings))
    # bitsandbytes on a CPU: int8 weights lose their scale between two forwards that are not checkpointed.
    trainer, unmoved = train(lora(), model=make_model(**settings), gradient_checkpointing=True)
    inner = trainer.model.get_base_model()
    assert unmoved == [] and inner.prior_head.mean.weight.dtype == torch.float32
    assert type(inner.backbone.get_decoder().layers[0].self_attn.k_proj).__name__ == linear
    expected = numbers(trainer.model, processor, rows)
    folder = trainer.args.output_dir

    def distance(model):
        return float((numbers(model, processor, rows) - expected).norm() / expected.norm())

    again = AMVLForConditionalGeneration.from_pretrained(folder, **settings)
    merge_adapter(folder, tmp_path / "merged", **settings)
    merged = AMVLForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    assert max(distance(again), distance(merged)) < 0.05  # bf16 matrices; int8 rounds what comes in, too
    # A whole AMVL checkpoint quantised: not its heads.
    model = AMVLForConditionalGeneration.from_pretrained(tmp_path / "merged", **settings)
    assert type(model.backbone.get_decoder().layers[0].self_attn.k_proj).__name__ == linear
    for part in LATENT_MODULES:
        assert {type(module).__name__ for module in getattr(model, part).modules()} <= {
            "GaussianHead",
            "LayerNorm",
            "Linear",
        }
    with pytest.raises(ValueError, match="purely quantized"):
        make_trainer(model=model)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------

# argv: a folder, a token. Pushes a stock model, trains on it by its Hub id, pushes the adapter alone, and another stock model.
TRAIN = """
from pathlib import Path
import torch
from tiny import build_tiny_backbone
from trl import ModelConfig
from recipes import sft_amvl
from trainer import AMVLSFTConfig
from trainer.data.color_steps import build_color_steps

root, token = Path(sys.argv[1]), sys.argv[2]
photo, rows = root / "photo.png", build_color_steps(4, image_size=48)
rows[0]["images"][0].save(photo)
rows.save_to_disk(root / "rows")
backbone, processor = build_tiny_backbone()
backbone.generation_config.eos_token_id, backbone.generation_config.max_new_tokens = None, 5
for part in (backbone, processor):
    part.push_to_hub("someone/stock", token=token)
args = AMVLSFTConfig(
    str(root / "run"), push_to_hub=True, hub_token=token, hub_model_id="someone/adapter", max_steps=4, learning_rate=0.05,
    per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, training_summary=False, self_test=False,
    gradient_checkpointing=False, save_strategy="no",
)
arguments = sft_amvl.AMVLScriptArguments(dataset_name=str(root / "rows"), num_latents=3, latent_size=8, merge_lora=False)
lora = ModelConfig("someone/stock", use_peft=True, lora_target_modules=["q_proj", "v_proj"], use_dora=True)
sft_amvl.main(arguments, args, lora)
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor

model = AMVLForConditionalGeneration.from_pretrained(root / "run")
said = answer(model, AMVLProcessor.from_pretrained(root / "run"), photo)
with torch.no_grad():
    for parameter in backbone.model.language_model.layers.parameters():
        parameter.copy_(-parameter)
backbone.push_to_hub("someone/stock", token=token)
print(json.dumps(said))
"""

# argv: a photo; prints a JSON object.
LOAD = """
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

name = snapshot_download("someone/adapter")
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
config, commit = model.config, model.peft_config["default"].revision
base = get_class_from_dynamic_module("modeling_amvl.AMVLForConditionalGeneration", "someone/adapter").from_backbone(
    "someone/stock", revision=commit, num_latents=3, latent_size=8, latent_token_id=config.latent_token_id
)
adapted = PeftModel.from_pretrained(base, "someone/adapter").get_base_model()
try:
    AutoModelForImageTextToText.from_pretrained("someone/adapter", trust_remote_code=True)
    error = None
except ValueError as raised:
    error = str(raised)
print(json.dumps({"answers": [answer(m, processor, sys.argv[1]) for m in (model, adapted)], "commit": commit, "error": error}))
"""


@pytest.mark.slow
def test_an_adapter_that_is_pushed_alone_loads_on_the_commit_of_its_base_in_a_fresh_process(hub, tmp_path):  # noqa: F811
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    trained = client(hub, tmp_path / "train", ASK + TRAIN, tmp_path, TOKEN, PYTHONPATH=path)
    said = json.loads(trained.stdout.splitlines()[-1])
    files = hub.models["someone/adapter"].files
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "adapters_amvl.py"} < files.keys()
    assert "model.safetensors" not in files and str(tmp_path).encode() not in files["README.md"].data
    (tmp_path / "README.md").write_bytes(files["README.md"].data)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "someone/stock"
    assert 'snapshot_download("someone/adapter")' in card.text

    for variables in ({}, {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "none_yet")}):
        script, photo = NO_REPOSITORY + ASK + LOAD, tmp_path / "photo.png"
        loaded = json.loads(client(hub, tmp_path / "stranger", script, photo, **variables).stdout.splitlines()[-1])
        assert loaded["answers"] == [said, said] and loaded["commit"] != hub.models["someone/stock"].head
        assert "a stock model has no latents" in loaded["error"]
