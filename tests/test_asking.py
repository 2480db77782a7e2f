"""Several latents per prompt: each answer is what its latents give alone, the prompt runs once, the vote is a count.

And other ways to decode: each gives what the dynamic cache gives, or is refused before anything runs.
"""

import collections
import json
import re

import pytest
import torch
from families import EOS, FAMILIES, PAD, build_backbone, make_prompts
from family_matrix import distance, samples_are_what_each_gives_alone
from test_family_matrix import FIVE
from test_generation import LATENT_SIZE, NUM_LATENTS, NUM_NEW, ROWS, Recorder, build_model, seeded
from transformers import CompileConfig, GenerationConfig

from modeling_amvl import AMVLProcessor
from modeling_amvl.families_amvl import NO_CHUNKED_PREFILL, NO_STATIC_CACHE
from modeling_amvl.refusals_amvl import refuse_decoding
from modeling_amvl.sampling_amvl import vote


NUM_SAMPLES = 4
SAMPLES = {"num_latent_samples": NUM_SAMPLES, "latent_temperature": 3.0, "max_new_tokens": NUM_NEW}


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def prompts():
    return make_prompts("llava", ROWS)


# ---------------------------------------------------------------------------------------------------------------------
# Which answers come out
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FIVE)
def test_samples_are_what_each_gives_alone(family):
    """Caches of full and sliding attention, of recurrent and convolutional states, of attention across to the image."""
    assert samples_are_what_each_gives_alone(family) < 1e-4  # fp32


@pytest.mark.parametrize(
    "setting",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static", "prefill_chunk_size": 7},
        {"num_beams": 2},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_settings_of_the_decoding_loop_go_with_samples(model, prompts, setting):
    samples = model.generate(**prompts, **SAMPLES, **setting, generator=seeded(), return_dict_in_generate=True)
    beams = setting.get("num_beams", 1)
    latents = samples.latents[::beams].unflatten(0, (len(ROWS), NUM_SAMPLES))
    assert torch.unique(latents.flatten(0, 1), dim=0).shape[0] == len(ROWS) * NUM_SAMPLES
    for sample in range(NUM_SAMPLES):
        alone = model.generate(**prompts, latents=latents[:, sample], **setting, max_new_tokens=NUM_NEW)
        assert torch.equal(samples.sequences[sample::NUM_SAMPLES], alone)


def test_what_looks_prompts_up_by_row_finds_them(model, prompts):
    asked = set()

    def allowed(row, ids):
        asked.add(row)
        return [10 + row]

    sequences = model.generate(**prompts, **SAMPLES, prefix_allowed_tokens_fn=allowed)
    assert asked == {0, 1, 2}
    assert sequences[:, -1].tolist() == [10] * NUM_SAMPLES + [11] * NUM_SAMPLES + [12] * NUM_SAMPLES


def test_processors_and_criteria_see_every_sample(model, prompts):
    length, seen = prompts["input_ids"].shape[1], []

    def processor(input_ids, scores):
        seen.append(tuple(input_ids.shape))
        return scores

    def criterion(input_ids, scores):
        return torch.full((len(input_ids),), input_ids.shape[1] == length + 2)

    sequences = model.generate(**prompts, **SAMPLES, logits_processor=[processor], stopping_criteria=[criterion])
    assert sequences.shape == (len(ROWS) * NUM_SAMPLES, length + 2)
    assert seen == [(len(ROWS) * NUM_SAMPLES, length), (len(ROWS) * NUM_SAMPLES, length + 1)]


def test_tokens_are_sampled_apart_where_they_are_sampled(model, prompts):
    latents = torch.randn(1, NUM_LATENTS, LATENT_SIZE).expand(3 * NUM_SAMPLES, -1, -1)  # the same for all
    sequences = model.generate(
        **prompts, num_latent_samples=NUM_SAMPLES, latents=latents, do_sample=True, top_k=0, max_new_tokens=NUM_NEW
    )
    assert len({tuple(row) for row in sequences.tolist()}) == 3 * NUM_SAMPLES


def test_one_sample_is_the_call_without(model, prompts):
    settings = {"latent_temperature": 1.0, "max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
    expected = model.generate(**prompts, **settings, generator=seeded())
    got = model.generate(**prompts, **settings, generator=seeded(), num_latent_samples=1)
    assert torch.equal(got.latents, expected.latents) and torch.equal(got.sequences, expected.sequences)
    model.generate(**prompts, max_new_tokens=1, num_latent_samples=1)  # at temperature 0


def test_given_latents_have_a_row_per_sample(model, prompts):
    latents = torch.randn(3 * NUM_SAMPLES, NUM_LATENTS, LATENT_SIZE)
    settings = {"num_latent_samples": NUM_SAMPLES, "max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
    output = model.generate(**prompts, latents=latents, **settings)
    assert torch.equal(output.latents, latents)
    alone = model.generate(**prompts, latents=latents[1::NUM_SAMPLES], max_new_tokens=NUM_NEW)
    assert torch.equal(output.sequences[1::NUM_SAMPLES], alone)
    with pytest.raises(ValueError, match=r"`latents` must be a tensor of shape \(12, 3, 8\), got \(3, 3, 8\)"):
        model.generate(**prompts, latents=latents[:3], **settings)


# ---------------------------------------------------------------------------------------------------------------------
# What they are drawn from, and what they cost
# ---------------------------------------------------------------------------------------------------------------------


def test_samples_follow_the_seed_and_not_the_batch(model, prompts):
    def latents(inputs, seed=0, **settings):
        return model.generate(
            **inputs, **SAMPLES | settings, generator=seeded(seed), return_dict_in_generate=True
        ).latents

    together = latents(prompts)
    assert torch.equal(together, latents(prompts)) and not torch.equal(together, latents(prompts, seed=1))
    for index, row in enumerate(ROWS):
        alone = latents(make_prompts("llava", [row]))
        torch.testing.assert_close(together[NUM_SAMPLES * index :][:NUM_SAMPLES], alone, rtol=1e-4, atol=1e-4)
    fewer = latents(prompts, num_latent_samples=2)
    expected = together.unflatten(0, (3, NUM_SAMPLES))[:, :2].flatten(0, 1)
    torch.testing.assert_close(fewer, expected, rtol=1e-5, atol=1e-5)


def test_samples_are_those_of_the_prior(model, prompts):
    prior = model.prior(**prompts)
    got = model.generate(**prompts, **SAMPLES, generator=seeded(), return_dict_in_generate=True).latents
    generator = seeded()
    noise = torch.cat([torch.randn(1, NUM_LATENTS, LATENT_SIZE, generator=generator) for _ in range(NUM_SAMPLES)])
    expected = prior.mean[:, None] + 3.0 * (prior.log_variance[:, None] / 2).exp() * noise
    torch.testing.assert_close(got, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_the_prompt_and_its_images_and_its_prior_run_once_per_prompt(prompts, setting):
    model = build_model()
    encoded, prior, layers = [], [], []
    model.get_encoder("image").register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    model.prior_head.register_forward_pre_hook(lambda module, args: prior.append(len(args[0])))
    layer = model.backbone.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args: layers.append(tuple(args[0].shape[:2])))
    model.generate(**prompts, **SAMPLES | setting)
    length, rows = prompts["input_ids"].shape[1], 3 * NUM_SAMPLES * setting.get("num_beams", 1)
    assert encoded == [len(prompts["pixel_values"])] and prior == [3]
    # A static cache lets the prior's placeholders run behind the prompt.
    behind = [(3, length), (3, NUM_LATENTS)] if "cache_implementation" in setting else [(3, length + NUM_LATENTS)]
    assert layers == [*behind, (rows, NUM_LATENTS), *[(rows, 1)] * (NUM_NEW - 1)]


# ---------------------------------------------------------------------------------------------------------------------
# The vote
# ---------------------------------------------------------------------------------------------------------------------


def test_the_majority_is_the_most_frequent_answer_up_to_its_end():
    a, b, c = [7, 8, EOS, 5, 5], [7, 8, EOS, 9, 9], [7, 9, EOS, PAD, PAD]
    d, e = [EOS, 1, 1, 1, 1], [1, 2, 3, 4, 5]
    answers = torch.tensor([c, a, b, d, *[e, d, d, e], *[e, a, c, d]])
    rows, shares = vote(answers, 4, [EOS])
    assert rows.tolist() == [1, 4, 8] and shares.tolist() == [0.5, 0.5, 0.25]  # a and b are one answer
    rows, shares = vote(answers[:4], 4, [])
    assert rows.tolist() == [0] and shares.tolist() == [0.25]  # without an end all four differ
    rows, shares = vote(answers[:4], 4, [8, EOS])
    assert rows.tolist() == [1]


def test_generate_returns_the_majority(model, prompts):
    length = prompts["input_ids"].shape[1]
    settings = SAMPLES | {"num_latent_samples": 9, "max_new_tokens": 1}
    samples = model.generate(**prompts, **settings, generator=seeded())
    output = model.generate(
        **prompts, **settings, generator=seeded(), return_majority=True, return_dict_in_generate=True
    )
    assert torch.equal(output.sample_sequences, samples)
    assert output.sequences.shape == (3, length + 1) and output.latents.shape == (27, NUM_LATENTS, LATENT_SIZE)
    for row, answers in enumerate(samples[:, -1].view(3, 9).tolist()):
        answer, count = collections.Counter(answers).most_common(1)[0]
        assert output.sequences[row, -1] == answer and float(output.majority_share[row]) == pytest.approx(count / 9)
    assert output.majority_share.min() < 1  # they differ
    bare = model.generate(**prompts, **settings, generator=seeded(), return_majority=True)
    assert torch.equal(bare, output.sequences)


@pytest.mark.parametrize("place", ["argument", "object", "file"])
def test_the_vote_ends_where_generation_does(prompts, place):
    """Wherever the end token is set: without it the answers would differ in what stands behind."""
    model = build_model()
    settings = {**SAMPLES, "num_latent_samples": 9, "generator": seeded()}
    first = int(model.generate(**prompts, **settings)[0, prompts["input_ids"].shape[1]])
    end, passed = {"eos_token_id": [EOS, first]}, {}
    if place == "argument":
        passed = end
    elif place == "object":
        of_object = {"max_new_tokens": settings.pop("max_new_tokens"), "return_dict_in_generate": True}
        passed = {"generation_config": GenerationConfig(pad_token_id=PAD, **of_object, **end)}
    else:
        model.generation_config.eos_token_id = end["eos_token_id"]
    if place != "object":
        passed["return_dict_in_generate"] = True
    output = model.generate(**prompts, **settings | passed | {"generator": seeded()}, return_majority=True)
    answers = output.sample_sequences[:9, prompts["input_ids"].shape[1] :]
    ended = [row.tolist().index(first) if first in row else NUM_NEW for row in answers]
    votes = collections.Counter(tuple(row[:end].tolist()) for row, end in zip(answers, ended, strict=True))
    assert float(output.majority_share[0]) == pytest.approx(max(votes.values()) / 9)
    assert 0 in ended


def test_texts_vote_without_regard_to_case_space_and_full_stop():
    assert AMVLProcessor.majority(["Two", " three. ", "two ", "Three", "THREE\n"]) == ("three.", 0.6)
    assert AMVLProcessor.majority(["b", "a", "a", "b"]) == ("b", 0.5)  # a tie: the first drawn
    assert AMVLProcessor.majority(["a  red\tcup", "A red cup."]) == ("a  red\tcup", 1.0)
    assert AMVLProcessor.majority(["", "."]) == ("", 1.0)
    for texts in ("two", [], [["two"]], [1], None):
        with pytest.raises(ValueError, match="`texts` must be a list of the answers to one question, got"):
            AMVLProcessor.majority(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[
            (
                {"num_latent_samples": value},
                f"`num_latent_samples` must be a positive integer or `None`, got {value!r}",
            )
            for value in (0, -1, True, False, 2.0, "8")
        ],
        (
            {"latent_temperature": 0},
            "`num_latent_samples=4` at `latent_temperature` 0 would be the same sample 4 times",
        ),
        ({"latent_temperature": None}, "pass `latent_temperature=1.0`"),  # the config's is 0
        ({"num_return_sequences": 2, "do_sample": True}, "does not go with `num_return_sequences=2`"),
        ({"num_return_sequences": 2, "num_beams": 2}, "does not go with `num_return_sequences=2`"),
        ({"streamer": Recorder()}, "`num_latent_samples=4` does not go with a `streamer`, got a `Recorder`"),
        ({"return_majority": "yes"}, "`return_majority` must be `True` or `False`, got 'yes'"),
        ({"return_majority": 1}, "`return_majority` must be `True` or `False`, got 1"),
        *[
            ({"return_majority": True, "num_latent_samples": value}, "`return_majority=True` needs several samples")
            for value in (None, 1)
        ],
        *[
            ({"latent_temperature": value}, "`latent_temperature` must be 0 or more, got")
            for value in (float("nan"), float("inf"), "1", True, -0.5)
        ],
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # the same in every worker
)
def test_what_does_not_go_with_samples_is_refused_before_anything_runs(prompts, settings, message):
    with pytest.raises(ValueError) as error:
        unable_to_run().generate(**prompts, **SAMPLES | settings)
    assert message in str(error.value)


def unable_to_run(family="llava"):
    model = build_model(family)
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: pytest.fail("something ran"))
    return model


def test_a_vote_over_rows_without_an_end_is_refused(model, prompts):
    def stop(input_ids, scores):
        return torch.full((len(input_ids),), True)

    settings = SAMPLES | {"stopping_criteria": [stop], "return_majority": True}
    with pytest.raises(
        ValueError, match="`return_majority=True` does not go with `stopping_criteria` where no `eos_to"
    ):
        unable_to_run().generate(**prompts, **settings)
    assert model.generate(**prompts, **settings, eos_token_id=EOS).shape == (3, prompts["input_ids"].shape[1] + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to decode
# ---------------------------------------------------------------------------------------------------------------------

REFUSED = [
    ("prompt_lookup_num_tokens", 3, "assisted decoding rolls the cache back"),
    ("assistant_early_exit", 1, "assisted decoding rolls the cache back"),
    ("use_mtp", True, "assisted decoding rolls the cache back"),
    ("guidance_scale", 1.5, "its unconditional half would run without latents"),
    ("penalty_alpha", 0.6, "remote code would not read the latents"),
    ("dola_layers", "high", "remote code would not read the latents"),
    ("num_beam_groups", 2, "remote code would not read the latents"),
    ("force_words_ids", [[1]], "remote code would not read the latents"),
    ("token_healing", True, "it generates within the prompt"),
    ("use_cache", False, "which live in the cache"),
    ("use_cache", 0, "which live in the cache"),
    ("cache_implementation", "paged", "it batches without a prefill"),
    ("cache_implementation", "offloaded", "never tried with latents, since it needs a GPU"),
    ("cache_implementation", "offloaded_static", "never tried with latents, since it needs a GPU"),
    ("num_latent_samples", 4, "is an argument of `generate`, no setting of a `generation_config`"),
    ("latent_temperature", 1.0, "is an argument of `generate`, no setting of a `generation_config`"),
    ("return_majority", True, "is an argument of `generate`, no setting of a `generation_config`"),
]


def test_no_setting_of_the_cache_is_the_cache(model, prompts):
    """The stock `generate` takes a `None` that it is passed for no cache."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    expected = model.generate(**prompts, **settings)
    assert torch.equal(model.generate(**prompts, **settings, use_cache=None), expected)
    config = GenerationConfig(**settings)
    config.use_cache = None
    assert torch.equal(model.generate(**prompts, generation_config=config), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_raise_instead_of_giving_an_empty_answer(model, prompts, value):
    latents = torch.full((3, NUM_LATENTS, model.config.latent_size), value)
    with pytest.raises(ValueError, match="The latents, those that were given, are not finite"):
        model.generate(**prompts, latents=latents, max_new_tokens=2)
    with pytest.raises(ValueError, match="drawn at `latent_temperature` 1e\\+300, are not finite"):
        model.generate(**prompts, latent_temperature=1e300, max_new_tokens=2)


@pytest.mark.parametrize("generator", [3, [torch.Generator()], "cpu"], ids=["number", "list", "string"])
def test_what_is_no_generator_is_refused_by_name(prompts, generator):
    with pytest.raises(ValueError, match="`generator` must be a `torch.Generator`"):
        unable_to_run().generate(**prompts, generator=generator, latent_temperature=1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "value", "reason"), REFUSED, ids=[f"{name}={value}" for name, value, _ in REFUSED])
@pytest.mark.parametrize("place", ["argument", "object", "beside_object", "file"])
def test_ways_to_decode_are_refused_wherever_they_are_set(checkpoint, tmp_path, prompts, name, value, reason, place):
    settings, of_generate = {"max_new_tokens": 2}, "argument of `generate`" in reason
    if place == "argument" and of_generate:
        pytest.skip("that is where it belongs")
    model = unable_to_run()
    if place == "argument":
        settings[name] = value
    elif place == "object":
        settings = {"generation_config": GenerationConfig(**settings)}
        setattr(settings["generation_config"], name, value)
    else:  # in the checkpoint's file, with or without an object that says nothing about it
        saved = json.loads((checkpoint / "generation_config.json").read_text()) | {name: value}
        saved.pop("_from_model_config", None)  # under which names that transformers does not know are dropped
        (tmp_path / "generation_config.json").write_text(json.dumps(saved))
        model.generation_config = GenerationConfig.from_pretrained(tmp_path)
        settings = {"generation_config": GenerationConfig(**settings)} if place == "beside_object" else settings
    with pytest.raises(ValueError, match=f"`{name}.*{reason}"):
        model.generate(**prompts, **settings)


def test_values_that_do_nothing_are_not_refused(model, prompts):
    expected = model.generate(**prompts, max_new_tokens=2)
    neutral = {"guidance_scale": 1.0, "penalty_alpha": 0.0, "num_beam_groups": 1, "token_healing": False}
    assert torch.equal(model.generate(**prompts, max_new_tokens=2, **neutral), expected)


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(call):
    model = unable_to_run()
    with pytest.raises(NotImplementedError, match="does not go with latents: call `generate` on a padded batch"):
        if call == "generate_batch":
            model.generate_batch([[1, 2]])
        elif call == "init_continuous_batching":
            model.init_continuous_batching()
        else:
            with model.continuous_batching_context_manager():
                pass


@pytest.mark.parametrize("family", sorted({*NO_STATIC_CACHE, *NO_CHUNKED_PREFILL} & {*FAMILIES}))
def test_families_that_a_cache_or_a_chunk_does_not_fit_are_refused(family):
    if family in NO_STATIC_CACHE:
        with pytest.raises(ValueError, match=f"`cache_implementation='static'` does not go with `{family}`"):
            refuse_decoding({"cache_implementation": "static"}.get, build_backbone(family))
    if family in NO_CHUNKED_PREFILL:
        with pytest.raises(ValueError, match=f"`prefill_chunk_size=7` does not go with `{family}`"):
            refuse_decoding({"prefill_chunk_size": 7}.get, build_backbone(family))


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "mllama", "lfm2_vl"])
def test_a_static_cache_gives_what_the_dynamic_one_gives(family):
    """Sliding windows, recurrent and convolutional states, attention across to the image; others are in test_generation.py."""
    model, prompts = build_model(family), make_prompts(family, ROWS[1:])
    settings = {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True, "output_logits": True}
    dynamic, static = (
        model.generate(**prompts, **settings, cache_implementation=kind) for kind in ("dynamic", "static")
    )
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(static.logits[-1], dynamic.logits[-1], rtol=1e-4, atol=1e-4)


def test_a_quantized_cache_answers_nearly_as_the_dynamic_one(model, prompts):
    """In 8 bits by torch alone; `quanto` and `hqq` ask for packages."""
    settings = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "fp8"},
        "return_dict_in_generate": True,
    }
    expected = model.generate(**prompts, max_new_tokens=NUM_NEW, return_dict_in_generate=True)
    got = model.generate(**prompts, max_new_tokens=NUM_NEW, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    assert 0 < distance(got.latents, expected.latents) < 0.05
    samples = model.generate(**prompts, **SAMPLES, **settings)
    latents = samples.latents[::NUM_SAMPLES]
    alone = model.generate(**prompts, latents=latents, max_new_tokens=NUM_NEW, **settings)
    assert torch.equal(samples.sequences[::NUM_SAMPLES], alone.sequences)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["forward", "by_generate"])
def test_compiled_decoding_gives_what_it_gave(prompts, compiled):
    """Compiled layers are in test_kernels.py, and a compiled backbone is refused there."""
    model = build_model()
    settings = {
        "num_latent_samples": 2,
        "latent_temperature": 3.0,
        "max_new_tokens": 3,
        "return_dict_in_generate": True,
    }
    expected = model.generate(**prompts, **settings, generator=seeded())
    torch._dynamo.reset()
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    if compiled == "forward":
        model.backbone.forward = torch.compile(model.backbone.forward, backend=keep)
    else:  # what `generate` does by itself on a GPU, with a cache of fixed size
        config = CompileConfig(backend=keep, mode=None, fullgraph=False)
        config._compile_all_devices = True
        settings |= {"cache_implementation": "static", "compile_config": config}
    got = model.generate(**prompts, **settings, generator=seeded())
    assert graphs and torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.latents, expected.latents, rtol=1e-4, atol=1e-4)
