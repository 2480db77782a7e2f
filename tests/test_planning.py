"""What planning predicts: against peaks of real training, against DeepSpeed's and accelerate's estimators, and by hand."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from families import build_backbone
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    CLIPVisionConfig,
    Florence2Config,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen3VLMoeConfig,
)
from trl import ModelConfig, TrlParser

from modeling_amvl import AMVLConfig
from recipes import plan_amvl
from recipes.benchmark_amvl import SHAPES
from trainer import AMVLSFTConfig
from trainer.planning.kept import ENGINES, GIB, Sizes, kept_bytes, sizes_of
from trainer.planning.model import build_model, parts_of, wrap_config
from trainer.planning.rehearsal import LiveMemory, Sequence, prefix_cache_bytes, rehearse


REPOSITORY = Path(__file__).resolve().parents[1]
NUM_LATENTS, LATENT_SIZE = 4, 16
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
}

# Real runs: sizes of the language model, words of a question, and what training settings they have.
RUNS = {
    "small, checkpointed": {"text_size": 128, "text_layers": 2, "num_words": 80, "gradient_checkpointing": True},
    "large": {"text_size": 224, "text_layers": 4, "num_words": 160},
    "large, checkpointed": {"text_size": 224, "text_layers": 4, "num_words": 160, "gradient_checkpointing": True},
    "wide, one batch a step": {"text_size": 384, "text_layers": 2, "num_words": 40, "gradient_accumulation_steps": 1},
    "LoRA, checkpointed": {
        "text_size": 224,
        "text_layers": 3,
        "num_words": 120,
        "lora": True,
        "gradient_checkpointing": True,
    },
    "bf16": {"text_size": 160, "text_layers": 3, "num_words": 80, "bf16": True},
}
WITHIN = 0.05  # of what is measured; 1 % at most here


def tiny_config(**settings):
    """A LLaVA whose parameters can be counted by hand."""
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **settings,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        image_token_index=63,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def tiny_model(dtype=torch.float32, peft_config=None, gradient_checkpointing=False, **settings):
    config = wrap_config(tiny_config(**settings), NUM_LATENTS, LATENT_SIZE)
    return build_model(config, dtype, peft_config, gradient_checkpointing)


@functools.cache
def config_7b():
    text, vision, _ = SHAPES["qwen2_5_vl_7b"]
    return Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "out_hidden_size": text["hidden_size"]})


@functools.cache
def sizes_7b():
    return sizes_of(build_model(wrap_config(config_7b()), torch.bfloat16))


# ---------------------------------------------------------------------------------------------------------------------
# Against real training, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def measure(text_size, text_layers, num_words, lora=False, **settings):
    """Trains with the real trainer, pictures included; the peak of what torch's allocator has handed out, and the rows' sizes."""
    import datasets
    from PIL import Image
    from torch.profiler import ProfilerActivity, profile

    from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
    from trainer import AMVLSFTTrainer
    from trainer.tiny_llava import build_llava

    words = ["red", "blue", "green"]
    backbone, processor = build_llava(words, 96, 16, text_size=text_size, text_layers=text_layers, vision_size=64)
    processor = AMVLProcessor.from_backbone(processor)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=NUM_LATENTS, latent_size=LATENT_SIZE, latent_token_id=processor.latent_token_id
    ).train()
    rows = [
        {
            "images": [Image.new("RGB", (96, 96), (30 * index, 0, 0))],
            "prompt": [
                {
                    "role": "user",
                    # All lengths differ, so that batches are padded.
                    "content": [{"type": "image"}, {"type": "text", "text": "red " * (num_words - index)}],
                }
            ],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "blue green " * 8}]}],
        }
        for index in range(8)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = AMVLSFTConfig(
            folder,
            **{"bf16": False, "gradient_checkpointing": False, "gradient_accumulation_steps": 2} | settings,
            per_device_train_batch_size=2,
            max_steps=2,
            self_test=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            training_summary=False,
        )
        trainer = AMVLSFTTrainer(
            model,
            args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=processor,
            peft_config=LoraConfig(**LORA) if lora else None,
        )
        batch = trainer.data_collator(rows)
        before = sum(parameter.nbytes for parameter in trainer.model.parameters())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return {
        "peak": before + peak,
        "config": backbone.config.to_dict(),
        "prompt_tokens": batch["input_ids"].shape[1],
        "answer_tokens": batch["completion_ids"].shape[1],
    }


@functools.cache
def measured():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    finished = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


def predicted(run, facts):
    mixed = run.get("bf16", False)
    config = wrap_config(LlavaConfig(**facts["config"]), NUM_LATENTS, LATENT_SIZE)
    lora = LoraConfig(**LORA) if run.get("lora") else None
    model = build_model(config, torch.float32, lora, run.get("gradient_checkpointing", False))
    accumulates = run.get("gradient_accumulation_steps", 2) > 1
    sequence = Sequence(facts["prompt_tokens"], facts["answer_tokens"], 2)
    step = rehearse(model, sequence, mixed, accumulates=accumulates, in_stages=lora is None)
    return sum(kept_bytes("single", sizes_of(model), 1, mixed).values()) + step


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_peak_of_a_real_run_is_within_five_per_cent(name):
    facts = measured()[name]
    ratio = predicted(RUNS[name], facts) / facts["peak"]
    assert abs(ratio - 1) < WITHIN, f"predicted / measured is {ratio:.3f}"


def test_measured_runs_differ_enough_for_a_constant_to_miss_them():
    sizes = [run["text_size"] ** 2 * run["text_layers"] for run in RUNS.values()]
    assert max(sizes) > 5 * min(sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Against the estimators of DeepSpeed and accelerate
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
def test_states_are_those_of_deepspeed(num_gpus):
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    total, largest = sizes_7b().total, sizes_7b().largest_module
    # DeepSpeed tells parameters apart by address, which those without storage do not have: its total is of no use here.
    assert largest == stage3.model_to_params(build_model(wrap_config(config_7b()), torch.bfloat16))[1]
    sizes = Sizes(total, 0, 2 * total, 0, largest, 0, 0)  # DeepSpeed takes every parameter as trained

    def ours(engine):
        kept = kept_bytes(engine, sizes, num_gpus, mixed=True)
        return sum(kept[part] for part in ("weights", "gradients", "optimiser", "gathered"))

    _, zero2 = stage2.estimate_zero2_model_states_mem_needs(total, num_gpus, cpu_offload=False)
    _, zero3, _ = stage3.estimate_zero3_model_states_mem_needs(
        total, largest, num_gpus, cpu_offload=False, cpu_offload_params=False
    )
    host, offloaded, _ = stage3.estimate_zero3_model_states_mem_needs(total, largest, num_gpus, zero_init=False)
    assert ours("zero2") == pytest.approx(zero2, rel=1e-6)
    assert ours("zero3") == pytest.approx(zero3, rel=1e-6)
    assert ours("zero3_offload") == pytest.approx(offloaded, rel=1e-6)
    assert kept_bytes("zero3_offload", sizes, num_gpus, True)["host"] == pytest.approx(host, rel=1e-6)


def test_states_in_fp32_are_those_of_accelerate():
    model = tiny_model()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for name, _ in list(model.named_buffers()):
        module, _, buffer = name.rpartition(".")
        del model.get_submodule(module)._buffers[buffer]  # accelerate counts them, no engine shares them out
    total, _ = calculate_maximum_sizes(model)
    usage = estimate_training_usage(total, "float32")
    kept = kept_bytes("single", sizes_of(model), 1, mixed=False)
    assert (kept["weights"], kept["gradients"], kept["optimiser"]) == (
        usage["model"],
        usage["gradients"],
        usage["optimizer"],
    )


# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------


def test_parts_are_those_counted_by_hand():
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    latents = 2 * 32 + 2 * (32 * LATENT_SIZE + LATENT_SIZE)
    parts = parts_of(tiny_model())
    assert parts["language model"] == (3 * layer + 32,) * 2
    assert parts["embeddings and head"] == (2 * 64 * 32,) * 2
    assert parts["projector"] == (16 * 32 + 32 + 32 * 32 + 32,) * 2
    assert parts["prior head"] == parts["posterior head"] == (latents,) * 2
    assert parts["latent projection"] == (LATENT_SIZE * 32 + 32,) * 2
    assert parts["vision encoder"][0] > 0 and parts["vision encoder"][1] == 0
    sizes = sizes_of(tiny_model())
    assert sizes.total == sum(count for count, _ in parts.values())
    assert sizes.trainable == sum(trained for _, trained in parts.values())
    patches = 3 * 14 * 14 * 16  # larger than a layer, this small
    assert (sizes.largest_module, sizes.largest_unit) == (
        patches,
        patches + 16 + 5 * 16,
    )  # with class token and positions
    vision_layers = 2 * (4 * (16 * 16 + 16) + 2 * 16 * 24 + 24 + 16 + 4 * 16)
    assert sizes.outside_units == sizes.total - 3 * layer - vision_layers - sizes.largest_unit
    assert sizes.trainable_bytes == 4 * sizes.trainable


def test_tied_tables_count_once():
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = build_model(wrap_config(config, NUM_LATENTS, LATENT_SIZE), torch.float32)
    assert parts_of(model)["embeddings and head"] == (64 * 32, 64 * 32)


def test_a_backbone_without_a_vision_encoder_is_planned_with_nothing_frozen():
    config = wrap_config(build_backbone("chameleon").config, NUM_LATENTS, LATENT_SIZE)
    with pytest.raises(ValueError, match="set `freeze_vision=False`"):
        build_model(config, torch.float32)
    model = build_model(config, torch.float32, freeze_vision=False)
    assert "vision encoder" not in parts_of(model)
    assert rehearse(model, Sequence(8, 4)) > 0


def test_lora_trains_its_matrices_and_the_latents_alone():
    model = tiny_model(torch.bfloat16, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    parts = parts_of(model)
    assert parts["LoRA"] == (3 * 4 * (32 + 32 + 32 + 16),) * 2  # not those of the vision encoder
    latents = parts_of(tiny_model())["prior head"][0]
    assert parts["prior head"] == (
        2 * latents,
        latents,
    )  # PEFT keeps the frozen original beside the copy that it trains
    assert all(parts[part][1] == 0 for part in ("vision encoder", "projector", "language model"))
    assert parts["embeddings and head"][1] == 32  # the placeholder's row
    sizes = sizes_of(model)
    assert sizes.trainable_bytes == 4 * sizes.trainable  # what is trained is in fp32


SMALL = Sizes(800, 200, 1600, 400, largest_module=100, largest_unit=50, outside_units=300)


@pytest.mark.parametrize(
    ("engine", "mixed", "expected"),
    [
        ("single", True, {"weights": 2000, "gradients": 1600, "optimiser": 3200}),
        ("ddp", True, {"weights": 2000, "gradients": 1600, "optimiser": 3200, "buckets": 1600}),
        ("zero2", True, {"weights": 2000, "gradients": 1200, "optimiser": 2400, "buckets": 10**9}),
        ("zero3", True, {"weights": 500, "gradients": 800, "optimiser": 2400, "gathered": 2000, "buckets": 10**9}),
        ("zero3_offload", True, {"gathered": 2000, "buckets": 10**9, "host": 27000}),
        ("fsdp2", True, {"weights": 900, "gradients": 800, "optimiser": 1600, "gathered": 800}),
        ("zero2", False, {"weights": 4000, "gradients": 800, "optimiser": 2400, "buckets": 2 * 10**9}),
    ],
)
def test_kept_bytes_of_four_gpus_are_those_worked_out_by_hand(engine, mixed, expected):
    kept = kept_bytes(engine, SMALL, 4, mixed)
    assert {part: size for part, size in kept.items() if size} == expected


def test_prefix_cache_is_keys_and_values_of_the_prompt():
    sequence = Sequence(20, 5, 3)
    per_token = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, size of a head, bytes
    # The placeholders of the prior ran with the prompt; they are cut off, but not freed.
    assert prefix_cache_bytes(tiny_model(), sequence) == 3 * (20 + NUM_LATENTS) * per_token
    model = tiny_model()
    model.config.multipass = "full"
    assert prefix_cache_bytes(model, sequence) == 0


def test_live_memory_counts_a_storage_once_and_lets_go_of_it():
    with LiveMemory() as memory:
        kept = torch.ones(100)
        view = kept[10:]
        assert (memory.live, memory.peak) == (400, 400)
        other = kept + 1
        assert memory.live == 800
        del other
        assert (memory.live, memory.peak) == (400, 800)
        del kept
        assert memory.live == 400 and view.numel() == 90


# ---------------------------------------------------------------------------------------------------------------------
# What a step needs
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_of_the_7b_model_has_storage():
    model = build_model(wrap_config(config_7b()), torch.bfloat16)
    assert all(isinstance(tensor, FakeTensor) for tensor in (*model.parameters(), *model.buffers()))
    assert sizes_of(model).total == sizes_7b().total == 8_301_361_664


def test_gradients_are_held_back_until_the_last_branch_has_passed_but_not_in_stages():
    sequence = Sequence(4, 2)
    model = tiny_model(gradient_checkpointing=True, hidden_size=256, intermediate_size=512)
    gradients = 4 * parts_of(model)["language model"][1]
    assert rehearse(model, sequence) > gradients > rehearse(model, sequence, accumulates=False)
    assert gradients > 2 * rehearse(model, sequence, in_stages=True)


def test_checkpointing_and_the_shared_plan_save_activations():
    sequence = Sequence(128, 8, 2)
    whole, checkpointed, full = (tiny_model(gradient_checkpointing=flag) for flag in (False, True, False))
    full.config.multipass = "full"
    steps = [rehearse(model, sequence) for model in (checkpointed, whole, full)]
    assert steps[0] < 0.6 * steps[1] and steps[1] < 0.7 * steps[2]


def test_rehearsal_leaves_the_model_as_it_was():
    model = tiny_model()
    first = rehearse(model, Sequence(16, 4))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert rehearse(model, Sequence(16, 4)) == first


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    return str(tmp_path)


def plan(*words):
    parser = TrlParser((plan_amvl.PlanArguments, AMVLSFTConfig, ModelConfig))
    words = ["--model_name_or_path", *words, "--use_cpu", "true", "--prompt_tokens", "32", "--answer_tokens", "4"]
    return plan_amvl.plan(*parser.parse_args_and_config(words, fail_with_unknown_args=False))


def test_command_prints_parts_and_engines(folder):
    recipe = REPOSITORY / "recipes" / "configs" / "smolvlm_2b_single_gpu.yaml"
    command = [sys.executable, "recipes/plan_amvl.py", folder, "--config", recipe, "--gpu_memory", "1.5"]
    command += ["--prompt_tokens", "64", "--num_gpus", "2", "4"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert finished.returncode == 0, finished.stderr[-4000:]
    lines = [line.split() for line in finished.stdout.splitlines()]
    assert any(line[:1] == ["LoRA"] for line in lines)
    (title,) = (line for line in finished.stdout.splitlines() if line.startswith("GiB"))
    assert "2 x (64 + 60) tokens, k = 8, gradient checkpointing on, bfloat16, bf16" in title
    rows = {(line[0], line[1]): line for line in lines if line[:1] and line[0] in ENGINES and line[1].isdigit()}
    assert set(rows) == {("single", "1")} | {(engine, n) for engine in ENGINES[1:] for n in ("2", "4")}
    assert "fits" in rows["single", "1"] and "not" not in rows["ddp", "4"]


@pytest.mark.parametrize(("share", "verdict"), [(2, "fits"), (1.05, "tight"), (0.95, "does not fit")])
def test_verdict_follows_the_memory(share, verdict):
    kept = kept_bytes("zero2", sizes_7b(), 4, mixed=True)
    step = 10 * GIB
    row = plan_amvl.engine_row("zero2", 4, kept, step, GIB, share * (sum(kept.values()) + step) / GIB)
    assert row[-2] == verdict


def test_columns_add_up_to_the_total(folder):
    _, (_, header, rows) = plan(folder, "--bf16", "false", "--dtype", "float32")
    added = [header.index(name) for name in ("weights", "gradients", "AdamW", "gathered", "buckets", "step")]
    assert len(rows) == 1 + 5 * 4
    for row in rows:
        assert sum(float(row[column]) for column in added) == pytest.approx(
            float(row[header.index("total")]), abs=0.04
        )


def test_a_trained_model_keeps_its_latents(tmp_path):
    config = wrap_config(tiny_config(), 3, 8)
    config.save_pretrained(tmp_path)
    (_, _, parts), (title, *_) = plan(str(tmp_path))
    assert "k = 3" in title and dict(row[:2] for row in parts)["latent projection"] == str(8 * 32 + 32)
    with pytest.raises(ValueError, match="`num_latents` is 4, but the model was trained with 3: leave it out"):
        plan(str(tmp_path), "--num_latents", "4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--engines", "zero1"],
            "`engine` must be one of single, ddp, zero2, zero3, zero3_offload, fsdp2, got 'zero1'",
        ),
        (["--num_gpus", "2", "0"], "`num_gpus` must be 1 or more, got 0"),
        (["--gpu_memory", "0"], "`gpu_memory` must be above 0 GiB, got 0.0"),
        (["--num_latents", "0"], "`num_latents` must be 1 or more, got 0"),
        (["--per_device_train_batch_size", "-1"], "`per_device_train_batch_size` must be 1 or more, got -1"),
        (["--freeze_vision", "false"], "`freeze_vision=False` is not planned"),
        (["--load_in_4bit", "true"], "`load_in_4bit` and `load_in_8bit` are not planned"),
        (["--optim", "adafactor"], "`optim` must be torch's AdamW, got 'adafactor'"),
        (["--dtype", "float16"], "`dtype` must be `bfloat16` or `float32`, got 'float16'"),
        (["--dtype", "bfloat16", "--bf16", "false"], "`bf16=False`, but `dtype` is bfloat16"),
        (["--multipass", "half"], "`multipass` must be `auto`, `shared` or `full`, got 'half'"),
    ],
)
def test_errors_name_the_setting_the_value_and_the_remedy(folder, words, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        plan(folder, *words)


@pytest.mark.parametrize("name", ["prompt_tokens", "answer_tokens"])
def test_tokens_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be 1 or more, got 0"):
        plan_amvl.PlanArguments(**{name: 0})
    with pytest.raises(ValueError, match=f"`{name}` must be 1 or more, got -3"):
        Sequence(**{"prompt_tokens": 5, "answer_tokens": 5, name: -3})


def test_a_sequence_longer_than_the_positions_is_refused_before_anything_is_built():
    config = wrap_config(tiny_config(), NUM_LATENTS, LATENT_SIZE)
    message = (
        "`prompt_tokens` 240, `num_latents` 4 and `answer_tokens` 13 are 257 tokens, but `llava` has 256 positions"
    )
    with pytest.raises(ValueError, match=message):
        rehearse(build_model(config, torch.float32), Sequence(240, 13))
    assert rehearse(build_model(config, torch.float32), Sequence(240, 12)) > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Florence2Config, "`florence2` is an encoder-decoder"),
        (LlamaConfig, "`llama` is no image-text-to-text model"),
    ],
)
def test_a_config_that_cannot_be_wrapped_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        wrap_config(config())


def test_a_step_that_depends_on_numbers_is_refused():
    text = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}
    text |= {"vocab_size": 64, "head_dim": 16, "pad_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61)
    model = build_model(wrap_config(config, NUM_LATENTS, LATENT_SIZE), torch.float32)
    with pytest.raises(ValueError, match="A step of `qwen3_vl_moe` cannot be rehearsed without storage"):
        rehearse(model, Sequence(8, 4))


def test_fsdp2_states_of_one_gpu_hold_two_fp32_copies_more_than_those_of_bf16_alone():
    bf16, fsdp2 = (kept_bytes(engine, sizes_7b(), 1, mixed=True) for engine in ("single", "fsdp2"))
    kept = ("weights", "gradients", "optimiser")
    assert sum(fsdp2[part] - bf16[part] for part in kept) == 8 * sizes_7b().trainable
    assert sum(bf16[part] for part in kept) / GIB == pytest.approx(58.06, abs=0.01)


def test_a_wrapped_config_is_an_amvl_one():
    config = wrap_config(tiny_config())
    assert isinstance(config, AMVLConfig) and (config.num_latents, config.latent_size) == (8, 512)


if __name__ == "__main__":
    print(json.dumps({name: measure(**run) for name, run in RUNS.items()}))
