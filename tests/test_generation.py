"""`generate` keeps the stock contract, with latents between the prompt and its answer."""

import threading

import pytest
import torch
from families import CORE_FAMILIES, EOS, HIDDEN_SIZE, PAD, SPARE_ROWS, VOCAB_SIZE, Row, build_backbone, make_prompts
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modeling_amvl import AMVLForConditionalGeneration


NUM_LATENTS, LATENT_SIZE, NUM_NEW = 3, 8, 6
ROWS = [Row(seed=0, num_images=2, num_words=4), Row(seed=1, num_words=9), Row(seed=2, num_words=3)]

families = pytest.mark.parametrize("family", CORE_FAMILIES)


def build_model(family="llava"):
    backbone = build_backbone(family)
    backbone.generation_config.eos_token_id = None  # random models end at random
    torch.manual_seed(0)
    return AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=NUM_LATENTS, latent_size=LATENT_SIZE, latent_token_id=SPARE_ROWS.start
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received.append(value)

    def end(self):
        self.ended = True


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens come out
# ---------------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_decoding_equals_teacher_forcing_under_the_same_latents(family, temperature):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    output = model.generate(
        **prompts,
        latent_temperature=temperature,
        max_new_tokens=NUM_NEW,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = output.sequences[:, prompts["input_ids"].shape[1] :]
    decoded = torch.stack(output.logits, dim=1).log_softmax(-1)  # (B, A, V)
    assert torch.equal(decoded.argmax(-1), answers)
    for plan in ("shared", "full"):
        model.config.multipass = plan
        log_prob = model.log_prob(**prompts, completion_ids=answers, latents=output.latents)
        expected = decoded.gather(-1, answers[..., None])[..., 0]
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-4)  # fp32
        other = model.log_prob(**prompts, completion_ids=answers, latents=output.latents + 1)
        assert (other - expected).abs().amax() > 1e-2
        for token in range(0, VOCAB_SIZE, 20):  # no token is likelier than the one that greedy decoding took
            others = model.log_prob(**prompts, completion_ids=answers.clone().fill_(token), latents=output.latents)
            assert (others[:, 0] <= log_prob[:, 0] + 1e-4).all()


@families
def test_a_padded_batch_generates_what_each_row_alone_generates(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    length = prompts["input_ids"].shape[1]
    assert prompts["attention_mask"].min() == 0
    together = model.generate(**prompts, max_new_tokens=NUM_NEW, return_dict_in_generate=True, output_logits=True)
    for index, row in enumerate(ROWS):
        prompt = make_prompts(family, [row])
        alone = model.generate(**prompt, max_new_tokens=NUM_NEW, return_dict_in_generate=True, output_logits=True)
        new = alone.sequences[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(together.sequences[index, length:], new)
        torch.testing.assert_close(together.latents[index], alone.latents[0], rtol=1e-4, atol=1e-4)
        for batched, single in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(batched[index], single[0], rtol=1e-4, atol=1e-4)


@families
def test_the_first_token_is_the_one_that_forward_predicts(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    generated = model.generate(**prompts, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    for plan in ("shared", "full"):
        model.config.multipass = plan
        output = model(**prompts)
        assert output.logits.shape == (3, 1, VOCAB_SIZE) and output.loss is None and output.posterior_mean is None
        assert torch.equal(output.logits[:, 0].argmax(-1), generated.sequences[:, -1])
        torch.testing.assert_close(output.logits[:, 0], generated.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.latents, generated.latents, rtol=1e-4, atol=1e-4)


@families
def test_the_prompt_comes_back_with_the_new_tokens_and_without_latents(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    sequences = model.generate(**prompts, max_new_tokens=NUM_NEW)
    length = prompts["input_ids"].shape[1]
    assert sequences.shape == (3, length + NUM_NEW)
    assert torch.equal(sequences[:, :length], prompts["input_ids"])
    positional = model.generate(prompts["input_ids"], max_new_tokens=NUM_NEW, **without(prompts, "input_ids"))
    assert torch.equal(positional, sequences)


def without(inputs, key):
    return {name: value for name, value in inputs.items() if name != key}


def test_the_output_holds_its_latents_like_its_other_fields():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    output = model.generate(**prompts, max_new_tokens=1, return_dict_in_generate=True)
    assert output["latents"] is output.latents and "latents" in output


@families
def test_the_answer_depends_on_the_latents(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    settings = {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True, "output_logits": True}
    latents = torch.randn(3, NUM_LATENTS, LATENT_SIZE)
    outputs = [model.generate(**prompts, latents=given, **settings) for given in (latents, -latents)]
    assert torch.equal(outputs[0].latents, latents)
    assert (outputs[0].logits[0] - outputs[1].logits[0]).abs().amax() > 1e-2
    assert not torch.equal(outputs[0].sequences, outputs[1].sequences)


def test_a_row_that_ends_is_padded_and_the_others_go_on():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    settings = {
        "max_new_tokens": NUM_NEW,
        "latents": 3 * torch.randn(len(ROWS), NUM_LATENTS, LATENT_SIZE),
    }  # so that answers differ
    free = model.generate(**prompts, **settings)
    length = prompts["input_ids"].shape[1]
    answers = free[:, length:].tolist()
    # A row that ends at once, with a token that no other row has.
    row = next(row for row, (end, *_) in enumerate(answers) if sum(end in answer for answer in answers) == 1)
    end, others = answers[row][0], [other for other in range(len(answers)) if other != row]
    ended = model.generate(**prompts, **settings, eos_token_id=end)
    assert ended[row, length:].tolist() == [end] + [PAD] * (NUM_NEW - 1)
    assert torch.equal(ended[others], free[others])


def test_prompts_without_padding_need_no_mask():
    model, prompts = build_model(), make_prompts("llava", [Row(seed=0), Row(seed=1)])
    expected = model.generate(**prompts, max_new_tokens=NUM_NEW)
    assert torch.equal(model.generate(**without(prompts, "attention_mask"), max_new_tokens=NUM_NEW), expected)


@families
@pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"prefill_chunk_size": 7}], ids=str)
def test_another_cache_or_prefill_generates_the_same(family, setting):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    settings = {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**prompts, **settings)
    got = model.generate(**prompts, **settings, **setting)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.latents, expected.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.logits[-1], expected.logits[-1], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Samples, beams, returned sequences
# ---------------------------------------------------------------------------------------------------------------------


@families
def test_sampling_is_reproducible_from_its_seeds(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)

    def sample(latent_seed, token_seed):
        torch.manual_seed(token_seed)
        return model.generate(
            **prompts,
            latent_temperature=1.0,
            generator=seeded(latent_seed),
            do_sample=True,
            max_new_tokens=NUM_NEW,
            return_dict_in_generate=True,
        )

    first, again, other_latents, other_tokens = sample(0, 0), sample(0, 0), sample(1, 0), sample(0, 1)
    assert torch.equal(first.latents, again.latents) and torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.latents, other_latents.latents)
    assert torch.equal(first.latents, other_tokens.latents)
    assert not torch.equal(first.sequences, other_tokens.sequences)


def test_latents_without_a_generator_follow_the_global_seed():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    latents = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        output = model.generate(**prompts, latent_temperature=1.0, max_new_tokens=1, return_dict_in_generate=True)
        latents.append(output.latents)
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


def test_latent_temperature_scales_the_noise_around_the_mean_of_the_prior():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    prior = model.prior(**prompts)

    def latents(**settings):
        return model.generate(**prompts, max_new_tokens=1, return_dict_in_generate=True, **settings).latents

    torch.testing.assert_close(latents(), prior.mean, rtol=1e-5, atol=1e-5)
    noise = torch.randn(3, NUM_LATENTS, LATENT_SIZE, generator=seeded())
    for temperature in (1.0, 0.3):
        expected = prior.mean + temperature * (prior.log_variance / 2).exp() * noise
        got = latents(latent_temperature=temperature, generator=seeded())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model.config.latent_temperature = 0.3
    torch.testing.assert_close(latents(generator=seeded()), expected, rtol=1e-5, atol=1e-5)


@families
def test_returned_sequences_have_latents_of_their_own_when_sampling(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    settings = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": NUM_NEW}
    output = model.generate(
        **prompts, latent_temperature=1.0, generator=seeded(), return_dict_in_generate=True, **settings
    )
    length = prompts["input_ids"].shape[1]
    assert output.sequences.shape == (6, length + NUM_NEW) and output.latents.shape == (6, NUM_LATENTS, LATENT_SIZE)
    assert torch.equal(output.sequences[:, :length], prompts["input_ids"].repeat_interleave(2, dim=0))
    assert len({tuple(row.flatten().tolist()) for row in output.latents}) == 6
    mean = model.generate(**prompts, return_dict_in_generate=True, **settings).latents  # temperature 0: one mean each
    torch.testing.assert_close(mean, model.prior(**prompts).mean.repeat_interleave(2, dim=0), rtol=1e-5, atol=1e-5)


@families
def test_the_beams_of_a_row_share_their_latents(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    output = model.generate(
        **prompts,
        latent_temperature=1.0,
        generator=seeded(),
        num_beams=4,
        num_return_sequences=2,
        max_new_tokens=NUM_NEW,
        return_dict_in_generate=True,
        output_scores=True,
    )
    length = prompts["input_ids"].shape[1]
    assert output.sequences.shape == (6, length + NUM_NEW)
    latents = output.latents.unflatten(0, (3, -1))
    assert torch.equal(latents, latents[:, :1].expand_as(latents))
    assert not torch.equal(latents[0, 0], latents[1, 0])
    # The score of a beam is its mean log-probability under those latents.
    for index, sequence in enumerate(output.sequences):
        prompt = make_prompts(family, [ROWS[index // 2]])
        log_prob = model.log_prob(**prompt, completion_ids=sequence[None, length:], latents=latents[index // 2, :1])
        torch.testing.assert_close(log_prob.mean(), output.sequences_scores[index], rtol=1e-4, atol=1e-4)
    greedy = model.generate(**prompts, latents=latents[:, 0], max_new_tokens=NUM_NEW)
    greedy_score = model.log_prob(**prompts, completion_ids=greedy[:, length:], latents=latents[:, 0]).mean(1)
    assert (output.sequences_scores[::2] >= greedy_score - 1e-4).all()


def test_one_beam_at_temperature_zero_is_greedy_decoding():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    greedy = model.generate(**prompts, max_new_tokens=NUM_NEW)
    sampled = model.generate(**prompts, max_new_tokens=NUM_NEW, do_sample=True, top_k=1)
    assert torch.equal(greedy, sampled)


@pytest.mark.parametrize("settings", [{"do_sample": True, "top_k": 1}, {"num_beams": 2}], ids=["samples", "beams"])
def test_given_latents_may_have_a_row_per_prompt_or_per_sequence(settings):
    model, prompts = build_model(), make_prompts("llava", ROWS)
    settings = {**settings, "num_return_sequences": 2, "max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
    latents = torch.randn(3, NUM_LATENTS, LATENT_SIZE)
    per_prompt = model.generate(**prompts, latents=latents, **settings)
    per_sequence = model.generate(**prompts, latents=latents.repeat_interleave(2, dim=0), **settings)
    assert torch.equal(per_prompt.sequences, per_sequence.sequences)
    assert torch.equal(per_prompt.latents, latents.repeat_interleave(2, dim=0))
    other = torch.randn(6, NUM_LATENTS, LATENT_SIZE)
    assert torch.equal(model.generate(**prompts, latents=other, **settings).latents, other)


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(2, NUM_LATENTS, LATENT_SIZE),
        torch.zeros(3, NUM_LATENTS + 1, LATENT_SIZE),
        torch.zeros(3, NUM_LATENTS, LATENT_SIZE + 1),
        torch.zeros(NUM_LATENTS, LATENT_SIZE),
        [[0.0]],
    ],
    ids=["rows", "slots", "size", "no_rows", "list"],
)
def test_given_latents_of_another_shape_are_refused(latents):
    model, prompts = build_model(), make_prompts("llava", ROWS)
    with pytest.raises(ValueError, match=r"`latents` must be a tensor of shape \(3 or 6, 3, 8\), got"):
        model.generate(**prompts, latents=latents, do_sample=True, num_return_sequences=2, max_new_tokens=1)


# ---------------------------------------------------------------------------------------------------------------------
# The stock contract around it
# ---------------------------------------------------------------------------------------------------------------------


@families
def test_a_streamer_gets_the_prompt_and_the_new_tokens_only(family):
    model, prompts = build_model(family), make_prompts(family, ROWS[:1])
    streamer = Recorder()
    sequences = model.generate(**prompts, max_new_tokens=NUM_NEW, streamer=streamer)
    assert streamer.ended and torch.equal(streamer.received[0], prompts["input_ids"])
    assert len(streamer.received) == 1 + NUM_NEW
    assert torch.equal(torch.cat(streamer.received[1:]), sequences[0, -NUM_NEW:])


def test_processors_and_criteria_see_no_latent():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    length, seen = prompts["input_ids"].shape[1], []

    def processor(input_ids, scores):
        seen.append(input_ids)
        return scores

    def criterion(input_ids, scores):
        return torch.full((len(input_ids),), input_ids.shape[1] == length + 2)

    sequences = model.generate(
        **prompts, max_new_tokens=NUM_NEW, logits_processor=[processor], stopping_criteria=[criterion]
    )
    assert sequences.shape[1] == length + 2  # the criterion ended it
    assert [ids.shape[1] for ids in seen] == [length, length + 1]
    assert all(torch.equal(ids, sequences[:, : ids.shape[1]]) for ids in seen)


@pytest.mark.parametrize("limit", ["max_length", "min_new_tokens"])
def test_limits_of_length_count_no_latent(limit):
    model, prompts = build_model(), make_prompts("llava", ROWS)
    length = prompts["input_ids"].shape[1]
    if limit == "max_length":
        assert model.generate(**prompts, max_length=length + 4).shape[1] == length + 4
    else:
        end = int(model.generate(**prompts, max_new_tokens=1)[0, -1])
        settings = {"eos_token_id": end, "min_new_tokens": 4, "max_new_tokens": NUM_NEW}
        assert end not in model.generate(**prompts, **settings)[:, length : length + 4]


def test_a_generation_config_may_be_passed_as_an_object():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    expected = model.generate(**prompts, do_sample=True, top_k=1, max_new_tokens=4)
    before = model.generation_config.to_dict()
    settings = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=4, pad_token_id=PAD)
    assert torch.equal(model.generate(**prompts, generation_config=settings), expected)
    assert torch.equal(model.generate(prompts["input_ids"], settings, **without(prompts, "input_ids")), expected)
    assert model.generation_config.to_dict() == before
    output = model.generate(
        **prompts, generation_config=GenerationConfig(num_beams=2, max_new_tokens=4, return_dict_in_generate=True)
    )
    assert output.latents.shape[0] in (3, 6) and output.sequences.shape[0] == 3


def test_the_generation_config_of_the_model_counts():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    length = prompts["input_ids"].shape[1]
    model.generation_config = GenerationConfig(max_new_tokens=2, pad_token_id=PAD)
    assert model.generate(**prompts).shape[1] == length + 2
    model.generation_config.eos_token_id = EOS
    model.generation_config.max_new_tokens = 3
    assert model.generate(**prompts).shape[1] <= length + 3


@families
def test_the_bare_backbone_is_unchanged_after_generating(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False}
    backbone = model.backbone
    before = backbone.generate(**prompts, **settings), backbone(**prompts).logits
    native, names, hooks = type(backbone), set(vars(backbone)), registered_hooks(backbone)
    model.generate(**prompts, **settings)
    with pytest.raises(ZeroDivisionError):
        model.generate(**prompts, **settings, logits_processor=[lambda input_ids, scores: 1 / 0])
    assert type(backbone) is native and set(vars(backbone)) == names and registered_hooks(backbone) == hooks
    assert torch.equal(backbone.generate(**prompts, **settings), before[0])
    assert torch.equal(backbone(**prompts).logits, before[1])


def registered_hooks(module):
    return {
        (name, hook)
        for name, part in module.named_modules()
        for hook in (*part._forward_hooks, *part._forward_pre_hooks)
    }


@families
def test_the_vision_encoder_runs_once_per_call(family):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    calls = []
    model.get_encoder("image").register_forward_pre_hook(lambda module, args: calls.append(1))
    model.generate(**prompts, max_new_tokens=NUM_NEW)
    assert len(calls) == 1


def test_the_prompt_runs_once_and_each_token_after_it_once():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    lengths = []
    layers = model.backbone.get_decoder().layers
    layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.generate(**prompts, max_new_tokens=4)
    # The prior's placeholders run with the prompt, whose cache forgets them; one that cannot lets them run behind it.
    assert lengths == [prompts["input_ids"].shape[1] + NUM_LATENTS, NUM_LATENTS, 1, 1, 1]
    lengths.clear()
    model.generate(**prompts, max_new_tokens=4, cache_implementation="static")
    assert lengths == [prompts["input_ids"].shape[1], NUM_LATENTS, NUM_LATENTS, 1, 1, 1]
    lengths.clear()
    model.generate(**prompts, latents=torch.zeros(3, NUM_LATENTS, LATENT_SIZE), max_new_tokens=4)
    assert lengths == [prompts["input_ids"].shape[1], NUM_LATENTS, 1, 1, 1]


@families
def test_threads_that_generate_at_once_get_what_each_gets_alone(family):
    model = build_model(family)
    requests = [make_prompts(family, ROWS[:1]), make_prompts(family, ROWS), make_prompts(family, ROWS[1:])]

    def ask(index):
        settings = {"latent_temperature": 1.0, "generator": seeded(index), "max_new_tokens": NUM_NEW}
        return model.generate(**requests[index], **settings)

    expected = [ask(index) for index in range(3)]
    failures, start = [], threading.Barrier(3)

    def work(index):
        try:
            start.wait()
            for _ in range(5):
                if not torch.equal(ask(index), expected[index]):
                    failures.append(f"request {index} got other tokens")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@families
def test_generating_in_training_mode_under_checkpointing_gives_the_same(family):
    """transformers switches the cache off there, and the latents would be lost with it."""
    model, prompts = build_model(family), make_prompts(family, ROWS)
    expected = model.generate(**prompts, max_new_tokens=NUM_NEW)
    model.train().activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert torch.equal(model.generate(**prompts, max_new_tokens=NUM_NEW), expected)
    assert model.is_activation_checkpointing


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"assistant_model": build_backbone("llava")}, "`assistant_model` does not go with latents"),
        ({"prompt_lookup_num_tokens": 2}, "`prompt_lookup_num_tokens` does not go with latents"),
        ({"custom_generate": "someone/loop"}, "`custom_generate` does not go with latents"),
        ({"past_key_values": object()}, "`past_key_values` does not go with latents: a given cache holds no latents"),
        ({"inputs_embeds": torch.zeros(3, 5, HIDDEN_SIZE)}, "`inputs_embeds` does not go with latents"),
        ({"use_cache": False}, "`use_cache=False` does not go with latents"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "`use_cache=False` does not go with latents"),
        (
            {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)},
            "`prompt_lookup_num_tokens` does not go with latents",
        ),
        ({"latent_temperature": -1.0}, "`latent_temperature` must be 0 or more, got -1.0"),
        ({"input_ids": None}, r"`input_ids` must be a tensor of shape \(B, P\), got NoneType"),
        (
            {"input_ids": torch.ones(4, dtype=torch.long)},
            r"`input_ids` must be a tensor of shape \(B, P\), got \(4,\)",
        ),
        ({"input_ids": [[1, 2]]}, r"`input_ids` must be a tensor of shape \(B, P\), got list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_latents_is_refused(settings, message):
    model, prompts = build_model(), make_prompts("llava", ROWS)
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts | settings)


def test_right_padded_prompts_are_refused():
    """The latents would stand behind the padding, and so would the first token of the answer."""
    model, prompts = build_model(), make_prompts("llava", ROWS)
    right = {key: prompts[key].flip(1) for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="left-padded"):
        model.generate(**prompts | right, max_new_tokens=1)


def test_an_argument_that_the_stock_generate_does_not_know_is_refused():
    model, prompts = build_model(), make_prompts("llava", ROWS)
    with pytest.raises(ValueError, match="latent_temprature"):
        model.generate(**prompts, max_new_tokens=2, latent_temprature=1.0)


@families
def test_latents_that_do_not_enter_the_backbone_raise(family, monkeypatch):
    model, prompts = build_model(family), make_prompts(family, ROWS)
    unused = torch.nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
    monkeypatch.setattr(type(model.backbone), "get_input_embeddings", lambda backbone: unused)
    with pytest.raises(RuntimeError, match="entered .* 0 times instead of once"):
        model.generate(**prompts, max_new_tokens=2)


def test_a_decoding_loop_without_a_prefill_raises(monkeypatch):
    model, prompts = build_model(), make_prompts("llava", ROWS)

    def sample(self, input_ids, **kwargs):
        return input_ids

    monkeypatch.setattr(type(model.backbone), "_sample", sample)
    with pytest.raises(RuntimeError, match="No latent reached the decoder of `LlavaForConditionalGeneration`"):
        model.generate(**prompts, max_new_tokens=2)
