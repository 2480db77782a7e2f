"""AMVLProcessor gives what the stock processor gives, knows the latent token, and comes back from a saved folder with
the image budget it went there with."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_meta
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    Emu3ImageProcessor,
    Emu3Processor,
    HunYuanVLImageProcessorPil,
    HunYuanVLProcessor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from modeling_amvl import processing_amvl
from modeling_amvl.processing_amvl import AMVLProcessor


REPOSITORY = Path(__file__).parents[1]

QUESTIONS = ["What is it?", "How many red circles are in the left half of the picture?"]
ANSWERS = ["A cat.", "Three red circles."]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

IDEFICS3_TOKENS = [
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]


def build_tokenizer(special_tokens):
    """A byte-level BPE tokenizer trained on the sentences above; it pads on the right.

    Args:
        special_tokens (`list[str]` or `dict[str, str]`): with a dict, the tokenizer gets attributes of its keys.
    """
    tokens = list(special_tokens.values()) if isinstance(special_tokens, dict) else special_tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330 + len(tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>", *tokens],
        show_progress=False,
    )
    tokenizer.train_from_iterator(QUESTIONS + ANSWERS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special_tokens,
    )


def build_llava():
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        build_tokenizer(["<image>"]),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
    )


def build_idefics3():
    return Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        build_tokenizer(IDEFICS3_TOKENS),
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
    )


def build_hunyuan_vl():
    names = ("image_token", "image_start_token", "image_end_token")
    return HunYuanVLProcessor(
        HunYuanVLImageProcessorPil(size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}),
        build_tokenizer(dict(zip(names, ("<image>", "<start>", "<end>")))),
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<start><image><end>"),
    )


def build_emu3():
    names = ("image_token", "boi_token", "eoi_token", "image_wrapper_token", "eof_token")
    return Emu3Processor(
        Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=64 * 64),
        build_tokenizer({name: "<image>" if name == "image_token" else f"<{name}>" for name in names}),
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
    )


BUILDERS = {"llava": build_llava, "idefics3": build_idefics3}
AREA_BUILDERS = {"hunyuan_vl": build_hunyuan_vl, "emu3": build_emu3}  # the area of an image has bounds


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def build_images():
    generator = np.random.default_rng(0)
    sizes = [(64, 32), (40, 60)]  # height, width
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def build_conversations():
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(build_images(), QUESTIONS)
    ]


def encode(processor):
    """A batch of two questions with one image each: {"input_ids": (2, S), "pixel_values": ..., ...}."""
    text = processor.apply_chat_template(build_conversations(), add_generation_prompt=True)
    images = [[image] for image in build_images()]
    return dict(processor(images=images, text=text, padding=True, return_tensors="pt"))


def assert_same_batch(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


def run_fresh(code, directory, *args, path=()):
    """Runs `code` in a fresh, offline process that finds nothing of this repository beyond the folders in `path`."""
    prelude = """
import sys

class NoRepository:  # also hides a copy that is installed in the environment
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_amvl", "trainer", "recipes", "model_cards"):
            raise ModuleNotFoundError(f"{name} is hidden from this process")
"""
    if path:
        prelude += f"\nsys.path[:0] = {[str(folder) for folder in path]!r}\n"
    if REPOSITORY not in path:
        prelude += "\nsys.meta_path.insert(0, NoRepository())\n"
    home = directory / "home"
    home.mkdir(exist_ok=True)
    environment = {
        **{
            name: os.environ[name]
            for name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
            if name in os.environ
        },
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-c", prelude + code, *map(str, args)]
    result = subprocess.run(
        command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- the stock behaviour ---------------------------------------------------------------------------------------------


def test_call_matches_the_stock_processor_padded_left(build):
    stock = build()
    stock.tokenizer.padding_side = "left"
    expected = encode(stock)
    batch = encode(AMVLProcessor.from_backbone(build()))
    assert_same_batch(batch, expected)
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist())
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][1].all()  # the first row is shorter
    assert not torch.equal(batch["input_ids"], encode(build())["input_ids"])  # which an unchanged processor pads right


def test_chat_template_matches_the_stock_processor(build):
    stock = build()
    stock.tokenizer.padding_side = "left"
    processor = AMVLProcessor.from_backbone(build())
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    options["processor_kwargs"] = {"padding": True}
    expected = stock.apply_chat_template(build_conversations(), **options)
    assert_same_batch(dict(processor.apply_chat_template(build_conversations(), **options)), dict(expected))
    assert (expected["input_ids"] == stock.image_token_id).sum() > 2  # images were really expanded
    assert processor.chat_template == stock.chat_template


def test_decoding_and_attributes_match_the_stock_processor(build):
    stock, processor = build(), AMVLProcessor.from_backbone(build())
    ids = encode(stock)["input_ids"]
    for name in ("batch_decode", "decode", "post_process_image_text_to_text"):
        decoded = getattr(processor, name)(ids, skip_special_tokens=True)
        assert decoded == getattr(stock, name)(ids, skip_special_tokens=True)
        assert QUESTIONS[1] in decoded[1]
    for name in ("image_token", "image_token_id", "model_input_names", "unused_input_names", "image_token_ids"):
        assert getattr(processor, name) == getattr(stock, name)
    assert processor.get_attributes() == stock.get_attributes()
    assert type(processor.image_processor) is type(stock.image_processor)
    sizes = [(40, 60), (64, 32)]
    assert processor._get_num_multimodal_tokens(sizes) == stock._get_num_multimodal_tokens(sizes)


def test_is_the_stock_class_and_the_base_of_every_amvl_processor(build):
    processor = AMVLProcessor.from_backbone(build())
    assert isinstance(processor, AMVLProcessor) and isinstance(processor, ProcessorMixin)
    assert isinstance(processor, type(build()))
    assert type(processor) is type(AMVLProcessor.from_backbone(build()))


def test_every_stock_class_keeps_its_own_methods():
    entries = [PROCESSOR_MAPPING_NAMES.get(family, ()) for family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    names = {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}
    classes = {getattr(transformers, name, None) for name in names}
    stock_classes = [c for c in classes if isinstance(c, type) and issubclass(c, ProcessorMixin)]
    assert len(stock_classes) > 50
    stock_overridden = {
        "__module__",
        "__doc__",
        "__new__",
        "__reduce__",
        "from_pretrained",
        "to_dict",
        "_merge_kwargs",
        "apply_chat_template",  # refuses arguments of `generate`, and goes on to the stock one
    }
    ours = {name for name, value in vars(AMVLProcessor).items() if name not in stock_overridden | set(vars(object))}
    ours -= {"__annotations__", "__dict__", "__weakref__", "_auto_class"}
    assert {"from_backbone", "latent_token", "image_budget"} < ours
    for stock in stock_classes:
        assert not ours & set(dir(stock)), stock
        combined = processing_amvl._processor_class(stock)
        assert combined.get_attributes() == stock.get_attributes(), stock
        for name in ("__init__", "__call__", "model_input_names"):
            assert getattr(combined, name) is getattr(stock, name), (stock, name)


def test_a_call_overrides_the_padding_side(build):
    processor = AMVLProcessor.from_backbone(build())
    batch = processor(text=QUESTIONS, padding=True, padding_side="right", return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 1 and batch["attention_mask"][0, -1] == 0


def test_the_given_processor_is_not_changed(build):
    given = build()
    before = (len(given.tokenizer), given.tokenizer.all_special_tokens, given.to_dict(), type(given))
    expected = encode(given)
    processor = AMVLProcessor.from_backbone(given)
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert (len(given.tokenizer), given.tokenizer.all_special_tokens, given.to_dict(), type(given)) == before
    assert given.tokenizer.padding_side == "right"
    assert_same_batch(encode(given), expected)


def test_pipeline_accepts_it():
    processor = AMVLProcessor.from_backbone(build_llava())
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": 28,
            "patch_size": 7,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_index=processor.image_token_id,
    )
    answer = pipeline("image-text-to-text", model=LlavaForConditionalGeneration(config), processor=processor)
    replies = answer(build_conversations(), max_new_tokens=3, batch_size=2, return_full_text=False)
    assert len(replies) == 2 and all(isinstance(reply[0]["generated_text"], str) for reply in replies)


def test_pickle_and_deepcopy(build):
    processor = AMVLProcessor.from_backbone(build())
    for other in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert type(other) is type(processor) and other is not processor
        assert other.latent_token_id == processor.latent_token_id
        assert_same_batch(encode(other), encode(processor))


# --- the latent token ------------------------------------------------------------------------------------------------


def test_latent_token_is_one_new_special_token(build):
    stock, processor = build(), AMVLProcessor.from_backbone(build())
    assert processor.latent_token == "<latent>"
    assert processor.latent_token_id == len(stock.tokenizer) == len(processor.tokenizer) - 1
    ids = processor.tokenizer("cat<latent><latent>.", add_special_tokens=False)["input_ids"]
    assert ids.count(processor.latent_token_id) == 2
    assert processor.decode(ids, skip_special_tokens=True) == "cat."
    assert "<latent>" in processor.tokenizer.all_special_tokens
    assert set(stock.tokenizer.all_special_tokens) < set(processor.tokenizer.all_special_tokens)


USER = "{%- for m in messages -%}<{{ m['role'] }}>{%- for p in m['content'] -%}{{ p.get('text', '') }}{%- endfor -%}"
FOLLOWED = {
    "header": (USER + "{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}", "<assistant>"),
    "newline": (
        USER.replace("}}>{%-", "}}>{{ '\n' }}{%-", 1)
        + "{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{{ '\n' }}{%- endif -%}",
        "\n",
    ),
    "thinks": (USER + "{%- endfor -%}{%- if add_generation_prompt -%}<assistant><think>{%- endif -%}", "<assistant>"),
    "no generation prompt": (USER + "{%- endfor -%}", "?"),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_the_token_that_an_answer_follows_is_the_last_before_it(build, case, caplog):
    template, followed = FOLLOWED[case]
    processor = AMVLProcessor.from_backbone(build())
    processor.chat_template = template
    last = processor.tokenizer(f"x{followed}", add_special_tokens=False)["input_ids"][-1]
    assert processor.answer_start_id == last
    assert not caplog.records


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{# nothing #}"])
def test_without_such_a_token_it_says_so(build, template, caplog):
    processor = AMVLProcessor.from_backbone(build())
    processor.chat_template = template
    assert processor.answer_start_id is None
    assert "no token that an answer follows" in caplog.text


def test_a_token_that_exists_keeps_its_id():
    stock = build_idefics3()
    processor = AMVLProcessor.from_backbone(stock, latent_token="<row_6_col_6>")
    assert processor.latent_token_id == stock.tokenizer.convert_tokens_to_ids("<row_6_col_6>")
    assert len(processor.tokenizer) == len(stock.tokenizer)


@pytest.mark.parametrize("token", ["</s>", "<pad>", "<image>"])
def test_a_token_with_another_role_is_refused(token):
    with pytest.raises(ValueError, match=f"`latent_token` is '{token}', which is already the `.*_token`"):
        AMVLProcessor.from_backbone(build_llava(), latent_token=token)


@pytest.mark.parametrize("token", ["", " ", None, 7])
def test_no_token_is_refused(token):
    with pytest.raises(ValueError, match="`latent_token` must be a token"):
        AMVLProcessor.from_backbone(build_llava(), latent_token=token)


# --- the image budget ------------------------------------------------------------------------------------------------


@pytest.fixture(params=AREA_BUILDERS)
def build_area(request):
    return AREA_BUILDERS[request.param]


def num_image_tokens(processor, **kwargs):
    """Number of `<image>` tokens that a large and a small image become together."""
    images = [[Image.new("RGB", (128, 192))], [Image.new("RGB", (16, 16))]]
    batch = processor(images=images, text=["<start><image><end>"] * 2, padding=True, return_tensors="pt", **kwargs)
    return (batch["input_ids"] == processor.image_token_id).sum().item()


def warnings_of(caplog):
    """The warnings that processors logged since the last call."""
    messages = [record.getMessage() for record in caplog.records if "image budget" in record.getMessage()]
    caplog.clear()
    return messages


def by_name(budget):
    return dict(sorted(budget.items()))


def edit_config(folder, edit):
    """Changes the saved `processor_config.json` with a function of its content."""
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def test_the_image_budget_is_what_decides_the_size_of_an_image():
    budgets = {name: AMVLProcessor.from_backbone(b()).image_budget for name, b in (BUILDERS | AREA_BUILDERS).items()}
    assert budgets["hunyuan_vl"] == {"min_pixels": 32 * 32, "max_pixels": 32 * 32 * 16}
    assert budgets["emu3"] == {"min_pixels": 16 * 16, "max_pixels": 64 * 64}
    assert budgets["llava"] == {
        "do_resize": True,
        "do_center_crop": True,
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    }
    assert budgets["idefics3"] == {
        "do_resize": True,
        "do_image_splitting": True,
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
    }


def test_the_image_budget_is_what_a_call_reads(monkeypatch, caplog):
    stock = build_hunyuan_vl()
    stock.image_processor = get_image_processor_class_from_name("Glm4vImageProcessorPil")(max_pixels=1000)
    assert stock.image_processor.max_pixels == 1000  # an attribute that nothing reads
    assert AMVLProcessor.from_backbone(stock).image_budget["max_pixels"] == stock.image_processor.size["longest_edge"]
    # Some stock classes have settings of their own, which precede those of the image processor.
    monkeypatch.setattr(LlavaProcessor, "images_kwargs", {"crop_size": {"height": 14, "width": 14}}, raising=False)
    processor = AMVLProcessor.from_backbone(build_llava())
    assert encode(processor)["pixel_values"].shape[-2:] == (14, 14)
    assert processor.image_budget["crop_size"] == {"height": 14, "width": 14}
    assert warnings_of(caplog) == []


def test_pixels_change_the_number_of_image_tokens(build_area, tmp_path):
    stock = build_area()
    stock.save_pretrained(tmp_path / "stock")
    before, budget = num_image_tokens(stock), AMVLProcessor.from_backbone(stock).image_budget
    low, high = budget["max_pixels"] // 4, budget["max_pixels"] * 4
    for backbone in (stock, tmp_path / "stock"):
        smaller = AMVLProcessor.from_backbone(backbone, max_pixels=low)
        assert smaller.image_budget == {"min_pixels": budget["min_pixels"], "max_pixels": low}
        assert num_image_tokens(smaller) < before
        larger = AMVLProcessor.from_backbone(backbone, min_pixels=budget["max_pixels"], max_pixels=high)
        assert larger.image_budget == {"min_pixels": budget["max_pixels"], "max_pixels": high}
        assert num_image_tokens(larger) > before
        for processor in (smaller, larger):
            processor.save_pretrained(tmp_path / "saved")
            again = [AMVLProcessor.from_pretrained(tmp_path / "saved"), copy.deepcopy(processor)]
            for other in (*again, pickle.loads(pickle.dumps(processor))):
                assert other.image_budget == processor.image_budget
                assert num_image_tokens(other) == num_image_tokens(processor)
    assert num_image_tokens(stock) == before  # the given processor is as it was


# Those of transformers 5.23 that bound the area of an image; MiniMax-M3-VL's, which needs torchvision, is missing.
AREA_IMAGE_PROCESSORS = {
    "CohereCompassImageProcessorPil",
    "Cosmos3EdgeImageProcessorPil",
    "Emu3ImageProcessor",
    "Ernie4_5_VLMoeImageProcessorPil",
    "Glm46VImageProcessorPil",
    "Glm4vImageProcessorPil",
    "GlmgaImageProcessorPil",
    "HunYuanVLImageProcessorPil",
    "PaddleOCRVLImageProcessorPil",
    "Qwen2VLImageProcessorPil",  # and Qwen2.5-VL, Qwen3-VL, Qwen3.5, ...
    "VideoLlama3ImageProcessorPil",
}


def test_every_image_processor_takes_a_budget_of_pixels_or_refuses_it():
    families = [
        IMAGE_PROCESSOR_MAPPING_NAMES.get(family) or {} for family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ]
    names = {family["pil"] for family in families if "pil" in family}
    assert names > AREA_IMAGE_PROCESSORS and len(names) > 40
    stock = build_hunyuan_vl()
    image = Image.new("RGB", (112, 168))
    refused = set()
    for name in names:
        stock.image_processor = get_image_processor_class_from_name(name)()
        sizes = set()
        for pixels in (60_000, 240_000):
            try:
                processor = AMVLProcessor.from_backbone(stock, min_pixels=pixels, max_pixels=pixels + 20_000)
            except ValueError as error:
                assert re.search(f"cannot be set.*`{name}` does not bound the pixels", str(error))
                assert AMVLProcessor.from_backbone(stock).image_budget, name
                refused.add(name)
                continue
            assert processor.image_budget == {"min_pixels": pixels, "max_pixels": pixels + 20_000}
            sizes.add(processor.image_processor(images=[image], return_tensors="np")["pixel_values"].shape)
        assert len(sizes) == (0 if name in refused else 2), name
    assert not AREA_IMAGE_PROCESSORS & refused and len(refused) > 25


def test_pixels_are_refused_where_the_area_has_no_bounds(build, tmp_path):
    stock = build()
    name = type(stock.image_processor).__name__
    AMVLProcessor.from_backbone(stock).save_pretrained(tmp_path)
    message = f"`max_pixels` cannot be set, got .*1000.*`{name}` does not bound the pixels.*'size': {{'.*Leave"
    with pytest.raises(ValueError, match=message):
        AMVLProcessor.from_backbone(stock, max_pixels=1000)
    with pytest.raises(ValueError, match=message):
        AMVLProcessor.from_pretrained(tmp_path, max_pixels=1000)
    unresized = build_hunyuan_vl()
    unresized.image_processor.do_resize = False
    with pytest.raises(ValueError, match="`max_pixels`, `min_pixels` cannot be set.*'do_resize': False"):
        AMVLProcessor.from_backbone(unresized, min_pixels=1000, max_pixels=2000)


@pytest.mark.parametrize("value", [0, -1, 1003520.0, "1003520", True])
@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
def test_pixels_that_are_no_number_of_pixels_are_refused_before_anything_is_loaded(name, value, tmp_path):
    for load in (AMVLProcessor.from_backbone, AMVLProcessor.from_pretrained):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive number of pixels.*got {value!r}"):
            load(tmp_path / "nothing", **{name: value})


def test_a_budget_that_contradicts_itself_is_refused(build_area):
    with pytest.raises(ValueError, match="`min_pixels` is 2000 and `max_pixels` is 1000"):
        AMVLProcessor.from_backbone("nothing", min_pixels=2000, max_pixels=1000)
    budget = AMVLProcessor.from_backbone(build_area()).image_budget
    with pytest.raises(ValueError, match=f"`min_pixels` is {budget['min_pixels']} and `max_pixels` is 100: give both"):
        AMVLProcessor.from_backbone(build_area(), max_pixels=100)


def test_an_amvl_processor_given_keeps_its_budget():
    processor = AMVLProcessor.from_backbone(build_hunyuan_vl(), max_pixels=32 * 32 * 4)
    assert AMVLProcessor.from_backbone(processor, max_pixels=32 * 32 * 4) is processor
    with pytest.raises(ValueError, match="asked for is {'max_pixels': 10240}, but .* has {.*'max_pixels': 4096}"):
        AMVLProcessor.from_backbone(processor, max_pixels=32 * 32 * 10)


@pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`:FutureWarning")
def test_what_the_tokenizer_was_loaded_with_is_part_of_the_budget(tmp_path, caplog):
    # The stock `from_pretrained` gives `max_pixels` to the tokenizer too, whose settings come first in every call.
    stock = build_hunyuan_vl()
    stock.tokenizer.init_kwargs["max_pixels"] = 32 * 32 * 2
    processor = AMVLProcessor.from_backbone(stock)
    assert processor.image_budget["max_pixels"] == 32 * 32 * 2
    assert num_image_tokens(processor) == num_image_tokens(stock) < num_image_tokens(build_hunyuan_vl())
    assert warnings_of(caplog) == []  # the call changes nothing
    processor = AMVLProcessor.from_backbone(stock, max_pixels=32 * 32 * 16)
    assert processor.image_budget["max_pixels"] == 32 * 32 * 16
    assert num_image_tokens(processor) == num_image_tokens(build_hunyuan_vl())
    # Ours does not.
    processor.save_pretrained(tmp_path)
    loaded = AMVLProcessor.from_pretrained(tmp_path, max_pixels=32 * 32 * 4)
    assert "max_pixels" not in loaded.tokenizer.init_kwargs


def test_a_checkpoint_carries_its_budget_and_another_one_warns(build_area, tmp_path, caplog):
    processor = AMVLProcessor.from_backbone(build_area())
    budget = processor.image_budget
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["image_budget"] == budget
    same = {"min_pixels": budget["min_pixels"], "max_pixels": budget["max_pixels"]}
    for pixels in ({}, same):
        assert AMVLProcessor.from_pretrained(tmp_path, **pixels).image_budget == budget
    assert warnings_of(caplog) == []

    other = budget | {"max_pixels": budget["max_pixels"] * 2}
    changed = AMVLProcessor.from_pretrained(tmp_path, max_pixels=other["max_pixels"])
    assert changed.image_budget == other
    (message,) = warnings_of(caplog)
    assert f"`{tmp_path}` is {by_name(other)}, but it was saved with {by_name(budget)}" in message

    changed.save_pretrained(tmp_path / "on-purpose")
    assert AMVLProcessor.from_pretrained(tmp_path / "on-purpose").image_budget == other
    assert warnings_of(caplog) == []

    # Edited after saving: what the image processor reads, and, in a checkpoint from before the record, silently.
    edited = changed.to_dict()["image_processor"]
    edit_config(tmp_path, lambda config: config.update(image_processor=edited))
    assert AMVLProcessor.from_pretrained(tmp_path).image_budget == other
    assert len(warnings_of(caplog)) == 1
    edit_config(tmp_path, lambda config: config.pop("image_budget"))
    assert AMVLProcessor.from_pretrained(tmp_path).image_budget == other
    assert warnings_of(caplog) == []


def test_a_size_that_differs_from_the_checkpoint_warns(build, tmp_path, caplog):
    AMVLProcessor.from_backbone(build()).save_pretrained(tmp_path)
    edge = "shortest_edge" if build is build_llava else "longest_edge"
    assert AMVLProcessor.from_pretrained(tmp_path, size={edge: 40}).image_budget["size"] == {edge: 40}
    (message,) = warnings_of(caplog)
    assert f"'size': {{'{edge}': 40}}" in message
    edit_config(tmp_path, lambda config: config["image_processor"].update(do_resize=False))
    assert AMVLProcessor.from_pretrained(tmp_path).image_budget["do_resize"] is False
    (message,) = warnings_of(caplog)
    assert "'do_resize': True" in message and "'do_resize': False" in message
    # What decides nothing about the size may change, and a setting that this transformers added is no difference.
    edit_config(tmp_path, lambda config: config["image_processor"].update(do_resize=True, image_mean=[0.1, 0.2, 0.3]))
    edit_config(tmp_path, lambda config: config["image_budget"].pop("do_resize"))
    AMVLProcessor.from_pretrained(tmp_path)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "overrides",
    [
        {"size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 4}},
        {"images_kwargs": {"size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 4}}},
        {"max_pixels": 32 * 32 * 4},
    ],
)
@pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`:FutureWarning")
def test_a_call_with_another_budget_warns_once(overrides, caplog):
    processor = AMVLProcessor.from_backbone(build_hunyuan_vl())
    before = num_image_tokens(processor)
    same = {"size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}, "do_resize": True}
    assert num_image_tokens(processor, **same) == num_image_tokens(processor, max_pixels=32 * 32 * 16) == before
    assert warnings_of(caplog) == []
    stock = build_hunyuan_vl()
    stock.tokenizer.padding_side = "left"
    for _ in range(2):
        assert num_image_tokens(processor, **overrides) == num_image_tokens(stock, **overrides) != before
    (message,) = warnings_of(caplog)
    called = overrides.get("images_kwargs", overrides)
    assert f"called with {called}" in message and str(processor.image_budget) in message
    assert num_image_tokens(pickle.loads(pickle.dumps(processor))) == before

    processor = AMVLProcessor.from_backbone(build_hunyuan_vl())
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": True, **overrides}}
    processor.apply_chat_template(build_conversations(), **options)
    assert len(warnings_of(caplog)) == 1


def test_calls_that_change_no_size_do_not_warn(build, caplog):
    processor = AMVLProcessor.from_backbone(build())
    encode(processor)
    processor(images=[[image] for image in build_images()], text=["<image>"] * 2, do_normalize=False, padding=True)
    assert warnings_of(caplog) == []
    processor(images=[[image] for image in build_images()], text=["<image>"] * 2, do_resize=False, padding=True)
    assert len(warnings_of(caplog)) == 1


FRESH_BUDGET = """
import logging
from transformers import AutoProcessor

logging.getLogger("transformers_modules").addHandler(logging.StreamHandler(sys.stdout))
for pixels in ({}, {"max_pixels": 32 * 32 * 9}):
    processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True, **pixels)
    print(processor.image_budget)
processor.save_pretrained(sys.argv[2])
"""


def test_remote_code_carries_the_budget_and_warns(tmp_path):
    budget = {"min_pixels": 32 * 32, "max_pixels": 32 * 32 * 4}
    AMVLProcessor.from_backbone(build_hunyuan_vl(), max_pixels=32 * 32 * 4).save_pretrained(tmp_path / "saved")
    lines = run_fresh(FRESH_BUDGET, tmp_path, tmp_path / "saved", tmp_path / "again").splitlines()
    other = {"min_pixels": 32 * 32, "max_pixels": 32 * 32 * 9}
    assert lines[0] == str(budget)
    assert f"`{tmp_path / 'saved'}` is {by_name(other)}, but it was saved with {by_name(budget)}" in lines[1]
    assert lines[2:] == [str(other)]
    assert AMVLProcessor.from_pretrained(tmp_path / "again").image_budget == other


# --- what can be wrapped ---------------------------------------------------------------------------------------------


def test_from_backbone_is_idempotent():
    processor = AMVLProcessor.from_backbone(build_llava(), latent_token="<z>")
    assert AMVLProcessor.from_backbone(processor, latent_token="<z>") is processor
    with pytest.raises(ValueError, match="`latent_token` is '<latent>'.* already uses '<z>'"):
        AMVLProcessor.from_backbone(processor)


def test_from_backbone_loads_a_folder(build, tmp_path):
    build().save_pretrained(tmp_path)
    expected = encode(AMVLProcessor.from_backbone(build()))
    for folder in (tmp_path, str(tmp_path)):
        assert_same_batch(encode(AMVLProcessor.from_backbone(folder, local_files_only=True)), expected)


def test_what_is_no_image_and_text_processor_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`backbone` must be a processor.* got `NoneType`"):
        AMVLProcessor.from_backbone(None)
    with pytest.raises(TypeError, match="got `TokenizersBackend`"):
        AMVLProcessor.from_backbone(build_tokenizer(["<image>"]))
    build_tokenizer(["<image>"]).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="got `TokenizersBackend`"):
        AMVLProcessor.from_backbone(tmp_path)
    with pytest.raises(TypeError, match="`trust_remote_code` only apply where `backbone` is a hub id or a folder"):
        AMVLProcessor.from_backbone(build_llava(), trust_remote_code=True)


@pytest.mark.parametrize("missing", ["tokenizer", "image_processor"])
def test_a_processor_that_lacks_a_part_is_refused(missing):
    processor = build_llava()
    setattr(processor, missing, None)
    present = ({"tokenizer", "image_processor"} - {missing}).pop()
    with pytest.raises(TypeError, match=f"the `LlavaProcessor` given has `{present}`"):
        AMVLProcessor.from_backbone(processor)


def test_a_class_outside_transformers_is_refused():
    class MyProcessor(LlavaProcessor):
        pass

    processor = build_llava()
    processor.__class__ = MyProcessor
    with pytest.raises(TypeError, match="`backbone` is a `MyProcessor` of .* only classes of `transformers`"):
        AMVLProcessor.from_backbone(processor)


def test_direct_construction_is_refused():
    with pytest.raises(TypeError, match="from_backbone"):
        AMVLProcessor(build_llava().image_processor, build_llava().tokenizer)


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(build, tmp_path):
    processor = AMVLProcessor.from_backbone(build(), latent_token="<z>")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]  # a setting that is not the default
    processor.save_pretrained(tmp_path / "first")
    loaded = AMVLProcessor.from_pretrained(tmp_path / "first")
    assert type(loaded) is type(processor)
    assert type(loaded.image_processor) is type(processor.image_processor)
    assert (loaded.latent_token, loaded.latent_token_id) == ("<z>", processor.latent_token_id)
    assert "<z>" in loaded.tokenizer.all_special_tokens
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.chat_template == processor.chat_template
    assert list(loaded.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert_same_batch(encode(loaded), encode(processor))
    # The class with both parents loads as its parent does, and nothing drifts from one save to the next.
    type(processor).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("processor_config.json", "chat_template.jinja", "processing_amvl.py"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_saved_folder_names_both_classes(build, tmp_path):
    AMVLProcessor.from_backbone(build()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["processor_class"] == "AMVLProcessor"
    assert config["backbone_processor_class"] == type(build()).__name__
    assert config["auto_map"] == {"AutoProcessor": "processing_amvl.AMVLProcessor"}
    assert (tmp_path / "processing_amvl.py").read_text() == Path(processing_amvl.__file__).read_text()


def test_the_saved_tokenizer_alone_keeps_token_and_side(build, tmp_path):
    processor = AMVLProcessor.from_backbone(build())
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left"
    assert tokenizer.convert_tokens_to_ids("<latent>") == processor.latent_token_id


def test_a_stock_folder_is_refused(tmp_path):
    build_llava().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no AMVL processor.*call `AMVLProcessor.from_backbone`"):
        AMVLProcessor.from_pretrained(tmp_path)


def test_a_stock_class_that_is_not_there_is_named(tmp_path):
    AMVLProcessor.from_backbone(build_llava()).save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(file.read_text().replace('"LlavaProcessor"', '"SomebodysProcessor"'))
    with pytest.raises(ValueError, match="`SomebodysProcessor`.* remote code"):
        AMVLProcessor.from_pretrained(tmp_path)


def test_file_imports_only_what_a_checkpoint_can(tmp_path):
    file = processing_amvl.__file__
    assert get_relative_imports(file) == []
    assert set(get_imports(file)) <= {"torch", "transformers"} | sys.stdlib_module_names


FRESH = """
import json
import torch
from pathlib import Path
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

try:
    import modeling_amvl
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the repository can be imported")

folder = Path(sys.argv[1])
text, files = json.loads((folder / "inputs.json").read_text())
for name in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(folder / name, trust_remote_code=True)
    assert type(processor).__name__ == "AMVLProcessor" and isinstance(processor, ProcessorMixin)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor).__module__
    processor.save_pretrained(folder / (name + "-again"))
    again = AutoProcessor.from_pretrained(folder / (name + "-again"), trust_remote_code=True)
    images = [[Image.open(folder / file)] for file in files]
    batches = [dict(p(images=images, text=text, padding=True, return_tensors="pt")) for p in (processor, again)]
    torch.save({"batches": batches, "latent_token_id": again.latent_token_id}, folder / (name + ".pt"))
"""


def save_inputs(folder, image_token):
    """Writes the two questions and images where `FRESH` reads them."""
    for index, image in enumerate(build_images()):
        image.save(folder / f"{index}.png")
    text = [f"user: {image_token}{question}\nassistant:" for question in QUESTIONS]
    (folder / "inputs.json").write_text(json.dumps([text, ["0.png", "1.png"]]))


def test_remote_code_loads_in_a_fresh_process(tmp_path):
    for name, build in BUILDERS.items():
        AMVLProcessor.from_backbone(build()).save_pretrained(tmp_path / name)
    save_inputs(tmp_path, "<image>")
    run_fresh(FRESH, tmp_path, tmp_path, *BUILDERS)
    for name, build in BUILDERS.items():
        processor = AMVLProcessor.from_backbone(build())
        result = torch.load(tmp_path / f"{name}.pt")
        assert result["latent_token_id"] == processor.latent_token_id
        assert len(result["batches"]) == 2
        for batch in result["batches"]:
            assert_same_batch(batch, encode(processor))


def test_remote_code_asks_for_trust(tmp_path):
    AMVLProcessor.from_backbone(build_llava()).save_pretrained(tmp_path / "llava")
    code = """
from transformers import AutoProcessor
try:
    AutoProcessor.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
"""
    assert "trust_remote_code" in run_fresh(code, tmp_path, tmp_path / "llava")


# --- the real Qwen2.5-VL processor -----------------------------------------------------------------------------------

QWEN_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]

QWEN_WRAP = """
import torchvision_meta

folder, torchvision = sys.argv[1:]
torchvision_meta.activate(torchvision)

import json
import torch
from pathlib import Path
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from modeling_amvl.processing_amvl import AMVLProcessor

folder = Path(folder)
text, files = json.loads((folder / "inputs.json").read_text())
images = [[Image.open(folder / file)] for file in files]
stock = Qwen2_5_VLProcessor(
    Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}),
    AutoTokenizer.from_pretrained(folder / "tokenizer"),
    Qwen2VLVideoProcessor(),
    chat_template="{{ messages[0]['content'] }}",
)
processor = AMVLProcessor.from_backbone(stock)
processor.save_pretrained(folder / "qwen")
stock.tokenizer.padding_side = "left"
batch, expected = (dict(p(images=images, text=text, padding=True, return_tensors="pt")) for p in (processor, stock))
assert processor.model_input_names == stock.model_input_names
assert processor.video_token_id == stock.video_token_id
sizes = [image[0].size[::-1] for image in images]
assert processor._get_num_multimodal_tokens(sizes) == stock._get_num_multimodal_tokens(sizes)
ids = expected["input_ids"]
assert processor.post_process_image_text_to_text(ids) == stock.post_process_image_text_to_text(ids)
budgets = {}
for name, max_pixels in (("lower", 28 * 28), ("higher", 28 * 28 * 1280)):
    changed = AMVLProcessor.from_backbone(stock, max_pixels=max_pixels)
    changed.save_pretrained(folder / name)
    loaded = AMVLProcessor.from_pretrained(folder / "qwen", max_pixels=max_pixels)  # warns
    again = AMVLProcessor.from_pretrained(folder / name)
    budgets[name] = [
        (p.image_budget, p(images=images, text=text, padding=True)["image_grid_thw"].prod(-1).tolist())
        for p in (changed, loaded, again)
    ]
    for p in (changed, loaded, again):
        assert p.video_processor.size == stock.video_processor.size
torch.save({"batch": batch, "expected": expected, "budgets": budgets}, folder / "stock.pt")
"""


@pytest.mark.slow
def test_real_qwen2_5_vl_processor(tmp_path, tmp_path_factory):
    torchvision = torchvision_meta.install(tmp_path_factory)
    tokenizer = build_tokenizer(QWEN_TOKENS)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_inputs(tmp_path, "<|vision_start|><|image_pad|><|vision_end|>")

    # A process that has torchvision wraps the stock processor and saves it; one that cannot see this repository loads.
    run_fresh(QWEN_WRAP, tmp_path, tmp_path, torchvision, path=[REPOSITORY, Path(__file__).parent])
    activate = f"import torchvision_meta; torchvision_meta.activate({str(torchvision)!r})\n"
    run_fresh(activate + FRESH, tmp_path, tmp_path, "qwen", path=[Path(__file__).parent])

    expected = torch.load(tmp_path / "stock.pt")["expected"]
    fresh = torch.load(tmp_path / "qwen.pt")
    assert fresh["latent_token_id"] == len(tokenizer)
    for batch in (torch.load(tmp_path / "stock.pt")["batch"], *fresh["batches"]):
        assert_same_batch(batch, expected)

    budgets = torch.load(tmp_path / "stock.pt")["budgets"]
    assert budgets["lower"] == [({"min_pixels": 28 * 28, "max_pixels": 28 * 28}, [4, 4])] * 3  # patches of one token
    assert budgets["higher"] == [({"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 1280}, [8, 8])] * 3

    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert batch["image_grid_thw"].tolist() == [[1, 4, 2], [1, 2, 4]]  # 64x32 and 40x60 pixels in patches of 14
    assert batch["pixel_values"].shape == (16, 3 * 2 * 14 * 14)
    assert (batch["input_ids"] == image_id).sum(dim=1).tolist() == [2, 2]  # one token for 2x2 patches
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == image_id)
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][1].all()

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
        },
        image_token_id=image_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape == (*batch["input_ids"].shape, len(tokenizer) + 1)
    assert logits[batch["attention_mask"].bool()].isfinite().all()
    new = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert new.shape == (2, batch["input_ids"].shape[1] + 3)
