"""``TransformersEngine`` gives the draws and log-probabilities of the plain model, whatever else is in the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.teachers import END, make_teacher, make_tokenizer, smollm2
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DeepseekV32Config,
    DogeConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxM3VLTextConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import slimkernels as sk
from slimkernels.search import (
    CheckedBranch,
    CheckedStep,
    PathFinder,
    PathFinderConfig,
    Question,
    RepetitionCheck,
    StepRequest,
    TransformersEngine,
    greedy,
    log_probability,
    read_trace,
)
from slimkernels.search.engines import draw_steps
from slimkernels.search.engines.branch_lengths import named_lengths

QUESTIONS = ["When the rain stopped", "Anna", "A black cat was sleeping on the old wall, and", "It"]
CONFIG = PathFinderConfig(branching_factor=3, beam=3, max_depth=3, max_step_tokens=9, temperature=0.9)
REQUEST = StepRequest(branch=0, path=(0,), attempt=0, seed=3, temperature=1.0, top_k=0, top_p=1.0, max_tokens=5)


@pytest.fixture(scope="module")
def model():
    return make_teacher()


@pytest.fixture
def engine(model):
    return TransformersEngine(model, make_tokenizer())


def never(_text):
    return False


def logits_after(model, token_ids):
    """Computes the plain model's logits (L, V) of a whole sequence."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


def nodes_of(tree):
    return {
        tree.path(node): (
            tree.step_token_ids(node),
            tree.steps[node],
            float(tree.sum_logprob[node]),
            tree.reasons[node],
        )
        for node in range(1, len(tree))
    }


def test_engine_draws_what_sample_logits_draws_from_the_plain_model(model, engine):
    # One batch has rows of different prompts, lengths and options; a second batch continues their branches.
    prompts = [engine.tokenizer(question)["input_ids"] for question in QUESTIONS]
    roots = engine.start(QUESTIONS)
    options = [(1.0, 0, 1.0, 5), (0.7, 5, 1.0, 2), (1.5, 0, 0.8, 40), (0.0, 0, 1.0, 1)]

    def requests_of(branches, seed):
        return [
            dataclasses.replace(REQUEST, branch=b, seed=seed + i, temperature=t, top_k=k, top_p=p, max_tokens=n)
            for i, (b, (t, k, p, n)) in enumerate(zip(branches, options, strict=True))
        ]

    first_requests = requests_of(roots, 10)
    first = engine.extend(first_requests, never, embed=False)
    second_requests = requests_of([step.branch for step in first], 90)
    second = engine.extend(second_requests, never, embed=False)
    for row, prompt in enumerate(prompts):
        token_ids = list(prompt)
        for step, request in ((first[row], first_requests[row]), (second[row], second_requests[row])):
            total = entropy = 0.0
            for token in step.token_ids:
                drawn = sk.sample_logits(
                    logits_after(model, token_ids)[-1],
                    seed=request.seed,
                    position=len(token_ids),
                    temperature=request.temperature,
                    top_k=request.top_k,
                    top_p=request.top_p,
                )
                assert drawn.token == token
                total += drawn.logprob.item()
                entropy += drawn.entropy.item()
                token_ids.append(token)
            assert step.sum_logprob == pytest.approx(total, abs=1e-4)
            assert step.sum_entropy == pytest.approx(entropy, abs=1e-4)
            assert len(step.token_ids) == request.max_tokens or step.token_ids[-1] in engine.eos_token_ids


def test_engine_greedy_is_generate(model, engine):
    input_ids = engine.tokenizer(QUESTIONS[0], return_tensors="pt")["input_ids"]
    expected = model.generate(input_ids, max_new_tokens=40, do_sample=False, pad_token_id=1)[0, input_ids.shape[1] :]
    config = PathFinderConfig(max_depth=5, max_step_tokens=8, step_end=never)
    [result] = greedy(engine, config).solve([QUESTIONS[0]])
    assert result.tree.token_ids(result.node) == expected.tolist()


def test_engine_log_probabilities_of_every_node_are_the_models(model, engine):
    results = PathFinder(engine, CONFIG, checks=()).solve(QUESTIONS)
    for question, result in zip(QUESTIONS, results, strict=True):
        prompt = engine.tokenizer(question)["input_ids"]
        tree = result.tree
        assert len(tree) > 12
        for node in range(1, len(tree)):
            own = tree.token_ids(node)
            logprobs = logits_after(model, prompt + own).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = logprobs.gather(-1, torch.tensor(own)[:, None]).double().sum().item()
            assert tree.sum_logprob[node] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_engine_branches_are_bit_equal_in_every_batch(dtype, threads, set_threads):
    set_threads(threads)
    engine = TransformersEngine(make_teacher(dtype=dtype), make_tokenizer())
    assert engine.is_batch_invariant()
    together = PathFinder(engine, CONFIG).solve(QUESTIONS)
    reordered = PathFinder(engine, dataclasses.replace(CONFIG, batch_questions=3)).solve(QUESTIONS[::-1])[::-1]
    alone = PathFinder(engine, dataclasses.replace(CONFIG, batch_questions=1)).solve(QUESTIONS)
    wide = PathFinder(engine, dataclasses.replace(CONFIG, beam=9)).solve(QUESTIONS)
    for one, two, three, four in zip(together, reordered, alone, wide, strict=True):
        assert nodes_of(one.tree) == nodes_of(two.tree) == nodes_of(three.tree)
        assert (one.text, one.scores) == (two.text, two.scores) == (three.text, three.scores)
        more = {path: step[:3] for path, step in nodes_of(four.tree).items()}
        assert len(more) > len(one.tree)
        assert all(more[path] == step[:3] for path, step in nodes_of(one.tree).items())


def test_engine_invariance_check_can_fail(model, engine, monkeypatch):
    read = engine._branch_model.read

    def noisy(branches, *rest):
        logits, hidden = read(branches, *rest)
        return logits + 1e-6 * len(branches), hidden

    monkeypatch.setattr(engine._branch_model, "read", noisy)
    assert not engine.is_batch_invariant()


def test_engine_reads_a_prompt_once_and_a_token_once_for_all_rows(model, monkeypatch):
    engine = TransformersEngine(model, make_tokenizer())
    shapes = []
    forward = model.forward

    def counted(*args, input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    config = PathFinderConfig(branching_factor=8, beam=8, max_depth=2, max_step_tokens=4, step_end=never)
    PathFinder(engine, config, checks=()).solve(QUESTIONS[:2])
    lengths = [len(engine.tokenizer(question)["input_ids"]) for question in QUESTIONS[:2]]
    # Depth 1: 16 rows, three forwards for four tokens. Depth 2: the last token of 16 leaves, then 128 rows.
    rows = [(1, lengths[0]), (1, lengths[1]), *[(16, 1)] * 3, (16, 1), *[(128, 1)] * 3]
    assert [(got[0] <= most[0], got[1]) for got, most in zip(shapes, rows, strict=True)] == [(True, s) for _, s in rows]


def test_engine_keys_and_values_are_shared_and_freed(model):
    engine = TransformersEngine(model, make_tokenizer())
    prompt = (" ".join(QUESTIONS))[:75]
    config = PathFinderConfig(branching_factor=4, beam=4, max_depth=3, max_step_tokens=5, step_end=never)
    PathFinder(engine, config, checks=()).solve([prompt])
    planned = PathFinder(engine, config, checks=()).plan([prompt])
    assert planned.prompt_tokens == engine.count_tokens(prompt)
    assert planned.cache_bytes >= engine.peak.shared_bytes
    assert engine.peak.unshared_bytes > 3 * engine.peak.shared_bytes > 0
    assert engine._branch_model.pool.num_used == 0
    assert engine._branch_model.branches == {}
    assert engine.memory().unshared_bytes == 0
    # Slots are reused: a second search needs no more.
    before = engine._branch_model.pool.num_bytes
    PathFinder(engine, config, checks=()).solve([prompt])
    assert engine._branch_model.pool.num_bytes == before


def test_engine_frees_everything_where_logits_are_nan():
    model = make_teacher()
    engine = TransformersEngine(model, make_tokenizer())
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        PathFinder(engine, CONFIG).solve(QUESTIONS)
    assert engine._branch_model.pool.num_used == 0
    assert engine._branch_model.branches == {}
    assert model.config._attn_implementation == "sdpa"


def test_engine_frees_everything_where_a_later_token_is_nan(model, engine, monkeypatch):
    read, calls = engine._branch_model.read, []

    def failing(branches, *rest):
        calls.append(len(branches))
        logits, hidden = read(branches, *rest)
        return (logits * float("nan") if len(calls) == 12 else logits), hidden

    monkeypatch.setattr(engine._branch_model, "read", failing)
    with pytest.raises(FloatingPointError, match="after the text"):
        PathFinder(engine, CONFIG).solve(QUESTIONS)
    assert engine._branch_model.pool.num_used == 0
    assert engine._branch_model.branches == {}


def test_engine_ends_a_branch_where_the_context_ends(model, engine):
    prompt = [5] * 120
    config = PathFinderConfig(branching_factor=2, beam=2, max_depth=9, max_step_tokens=5, step_end=never)
    [result] = PathFinder(engine, config, checks=(), selector=log_probability).solve([prompt])
    assert engine.context_length == 128
    assert result.reasons.get("context", 0) >= 1
    assert result.tree.num_tokens.max() == 8


def scripted_engine(monkeypatch, tokenizer, token_ids):
    """Makes an engine that draws the given tokens, one after the other, whatever its model's logits are."""
    engine = TransformersEngine(make_teacher(vocab_size=len(tokenizer)), tokenizer)
    drawn = iter(token_ids)
    monkeypatch.setattr(draw_steps, "sample_logits", lambda logits, **_: only(logits, next(drawn)))
    return engine


def byte_fallback_tokenizer():
    """Makes a tokenizer to which every character outside ASCII is a run of bytes, as to sentencepiece's models."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257, "<|end|>": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<|end|>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", clean_up_tokenization_spaces=False)


TEXTS = [
    "na\u00efve\U0001f600\U0001f469\u200d\U0001f4bb!",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u6f22\u5b57\u3068\u304b\u306a",
]


@pytest.mark.parametrize("make", [make_tokenizer, byte_fallback_tokenizer, lambda: smollm2()[1]])
@pytest.mark.parametrize("max_step_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("text", TEXTS)
def test_text_of_a_branch_is_that_of_its_tokens(monkeypatch, make, max_step_tokens, text):
    tokenizer = make()
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Bytes that begin no character, and a character that is not completed.
    token_ids = [
        *token_ids,
        *tokenizer("a")["input_ids"],
        *token_ids[-2:],
        *tokenizer("a\U0001f600", add_special_tokens=False)["input_ids"][:-1],
    ]
    engine = scripted_engine(monkeypatch, tokenizer, token_ids)
    token_ids += tokenizer("a")["input_ids"] * (-len(token_ids) % max_step_tokens)
    depth = len(token_ids) // max_step_tokens
    config = PathFinderConfig(max_depth=depth, max_step_tokens=max_step_tokens, step_end=never, answer_kind=None)
    [result] = greedy(engine, config).solve([Question(tokenizer("ab")["input_ids"], "")])
    tree = result.tree
    assert len(tree) == depth + 1
    for node in range(1, len(tree)):
        assert tree.text(node) == tokenizer.decode(tree.token_ids(node), skip_special_tokens=True)
    assert result.text == tree.text(depth)
    assert result.text.startswith(text)


@pytest.mark.parametrize(
    ("end", "text"), [("<|sep|>", "ab"), ("b<|sep|>", "ab"), ("<|sep|>c", "abc"), ("<|no|>", "abca")]
)
def test_special_token_in_a_stop_text_ends_a_branch(monkeypatch, end, text):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|sep|>"]})
    prompt = tokenizer("a<|sep|>")["input_ids"]
    engine = scripted_engine(monkeypatch, tokenizer, tokenizer("ab<|sep|>ca")["input_ids"])
    config = PathFinderConfig(max_depth=5, max_step_tokens=1, step_end=never, answer_kind=None)
    [result] = greedy(engine.ending_at([end, "plain"]), config).solve([Question(prompt, "")])
    assert (result.text, result.finished) == (text, end != "<|no|>")
    assert engine.special_ends == ()


def test_engine_asks_plain_questions_in_the_models_chat_template(model):
    tokenizer = make_tokenizer()
    engine = TransformersEngine(model, tokenizer)
    assert engine.chat_prompt("Anna") is None
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}!"
    assert engine.chat_prompt("Anna") == tokenizer("<|start|>Anna!")["input_ids"]
    assert engine.chat_prompt("<|start|>Anna!") is None


def test_text_of_a_branch_is_kept_by_its_trace(monkeypatch, tmp_path):
    tokenizer = make_tokenizer()
    engine = scripted_engine(monkeypatch, tokenizer, tokenizer("\U0001f600 ab")["input_ids"])
    config = PathFinderConfig(max_depth=3, max_step_tokens=2, step_end=never, answer_kind=None)
    path = tmp_path / "trace.jsonl"
    [result] = greedy(engine, config).solve(["ab"], trace=path)
    assert result.text.startswith("\U0001f600 ")
    [traced] = read_trace(path).questions
    assert traced.progress.tree.text(result.node) == result.text


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_engine_embeddings_are_pooled_hidden_states(model, layer):
    engine = TransformersEngine(model, make_tokenizer(), embedding_layer=layer)
    prompt = engine.tokenizer(QUESTIONS[0])["input_ids"]
    [root] = engine.start([QUESTIONS[0]])
    for max_tokens in (1, 6):
        request = dataclasses.replace(REQUEST, branch=root, max_tokens=max_tokens, temperature=0.0)
        [step] = engine.extend([request], never, embed=True)
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *step.token_ids]])
            hidden = model(ids, output_hidden_states=True).hidden_states[layer][0]
        first = len(prompt) if max_tokens > 1 else len(prompt) - 1
        expected = hidden[first:-1].mean(0) - hidden[: len(prompt)].mean(0)
        np.testing.assert_allclose(step.embedding, expected, atol=1e-4)
    assert engine.extend([dataclasses.replace(REQUEST, branch=root)], never, embed=False)[0].embedding is None


@pytest.mark.parametrize("config_class", [GPT2Config, GPTNeoXConfig, Qwen3Config, MistralConfig])
def test_engine_runs_other_architectures(config_class):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128} if config_class is GPT2Config else {}
    engine = TransformersEngine(make_teacher(config_class=config_class, **sizes), make_tokenizer())
    [result] = PathFinder(engine, CONFIG, checks=()).solve([QUESTIONS[0]])
    assert len(result.tree) > 9


def test_engine_stays_within_a_sliding_window():
    engine = TransformersEngine(make_teacher(config_class=MistralConfig, sliding_window=24), make_tokenizer())
    assert engine.context_length == 24
    with pytest.raises(ValueError, match="shorter than the model's context of 24 tokens"):
        PathFinder(engine).solve(["x" * 24])


LONG_ROPE = {
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 128 / 24,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 4.0, 9.0, 16.0],
        "original_max_position_embeddings": 24,
    },
}
SPARSE = {
    **{"layer_types": ["minimax_m3_sparse", "full_attention"], "index_head_dim": 8, "index_n_heads": 2},
    **{"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_hidden_layers": 4, "pad_token_id": 1}


def tokens(length):
    return [(token * 7919 + 13) % 300 for token in range(length)]


def generated(model, prompt, count):
    output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=1)
    return output[0, len(prompt) :].tolist()


def test_engine_reads_branches_on_both_sides_of_a_switch_of_frequencies_as_alone():
    # Prompts below and above the length of 24, and branches that cross it, in one batch.
    model = make_teacher(config_class=Phi3Config, **LONG_ROPE)
    engine = TransformersEngine(model, make_tokenizer())
    assert engine.context_length == 128
    assert engine.is_batch_invariant(num_rows=20)
    config = PathFinderConfig(max_depth=5, max_step_tokens=4, step_end=never, answer_kind=None)
    prompts = [tokens(length) for length in (12, 40, 23, 24, 60)]
    together = greedy(engine, config).solve([Question(prompt, "") for prompt in prompts])
    for prompt, result in zip(prompts, together, strict=True):
        [alone] = greedy(engine, config).solve([Question(prompt, "")])
        assert nodes_of(alone.tree) == nodes_of(result.tree)
        assert result.tree.token_ids(result.node) == generated(model, prompt, 20)


@pytest.mark.parametrize(
    ("config_class", "options", "length"),
    [
        (Llama4TextConfig, {**LLAMA4, "attention_chunk_size": 24}, 24),
        (Llama4TextConfig, {**LLAMA4, "attention_chunk_size": 128, "floor_scale": 24}, 128),
        (DogeConfig, {"head_dim": 8, "keep_window_size": 24}, 24),
        (MiniMaxM3VLTextConfig, {**SPARSE, "index_block_size": 24}, 24),
        (LlamaConfig, {"rope_parameters": YARN}, 128),
    ],
)
def test_engine_equals_generate_up_to_the_length_past_which_it_would_not(config_class, options, length):
    model = make_teacher(config_class=config_class, **options)
    engine = TransformersEngine(model, make_tokenizer())
    assert engine.context_length == length
    prompt = tokens(12)
    config = PathFinderConfig(max_depth=5, max_step_tokens=8, step_end=never, answer_kind=None)
    [result] = greedy(engine, config).solve([Question(prompt, "")])
    own = result.tree.token_ids(result.node)
    assert len(own) == min(40, length - len(prompt))
    assert own == generated(model, prompt, len(own))


def test_engine_does_not_go_beyond_lengths_that_are_too_long_to_try():
    options = {**LLAMA4, "attention_chunk_size": 300, "max_position_embeddings": 1000}
    assert (
        TransformersEngine(make_teacher(config_class=Llama4TextConfig, **options), make_tokenizer()).context_length
        == 300
    )


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            {"sliding_window": 9, "max_window_layers": 3, "chunk_size_feed_forward": 4, "vision": {"window_size": 5}},
            [9, 5],
        ),
        ({"rope_parameters": {"full": {"original_max_position_embeddings": 7}}, "id2label": {0: "a"}}, [7]),
        ({"index_block_size": 8, "index_topk_blocks": 3, "index_topk": 5, "use_sliding_window": True}, [5, 8, 24]),
        ({"attention_window": [16, 32], "log_scaling_n_floor": 12, "hidden_size": 4}, [12, 16]),
    ],
)
def test_engine_finds_the_lengths_that_a_configuration_names(config, names):
    class Config:
        def to_dict(self):
            return config

    assert sorted(named_lengths(Config()).values()) == sorted(names)


LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4},
    **{"index_topk": 16, "index_head_dim": 8, "index_n_heads": 2},
}


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (MiniMaxM3VLTextConfig, {**SPARSE, "index_block_size": 8, "index_topk_blocks": 2}),
        (DeepseekV32Config, LATENT),
    ],
)
def test_engine_refuses_models_whose_forward_needs_more_than_plain_attention(config_class, options):
    model = make_teacher(config_class=config_class, **options)
    with pytest.raises(ValueError, match=r"plain softmax attention, but the forward of .* use ServerEngine"):
        TransformersEngine(model, make_tokenizer())


@pytest.mark.parametrize(
    ("config_class", "message"),
    [(Gemma2Config, "plain softmax attention"), (MambaConfig, "attention of all its 2 layers")],
)
def test_engine_refuses_models_that_it_would_not_reproduce(config_class, message):
    model = make_teacher(config_class=config_class)
    with pytest.raises(ValueError, match=message):
        TransformersEngine(model, make_tokenizer())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "must have text in it"), ([5, 300], r"token ids must be in \[0, V = 300\)"), ([5] * 128, "must be shorter")],
)
def test_engine_refuses_prompts(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        PathFinder(engine).solve([Question(prompt)])


def test_engine_knows_the_end_of_text(model):
    tokenizer = make_tokenizer()
    assert TransformersEngine(model, tokenizer).eos_token_ids == {tokenizer.convert_tokens_to_ids(END)}
    engine = TransformersEngine(model, tokenizer, eos_token_ids=range(300))
    [root] = engine.start(["Anna"])
    [step] = engine.extend([dataclasses.replace(REQUEST, branch=root)], never, embed=False)
    assert (len(step.token_ids), step.end) == (1, "end_of_text")


@pytest.mark.slow
def test_engine_embeddings_of_a_real_model_tell_a_repeated_step_from_a_new_one():
    engine = TransformersEngine(*smollm2())
    said = "She eats 3 eggs for breakfast, so 16 - 3 = 13 eggs remain.\n"
    prompt = engine.tokenizer("Question: how much does Janet make with the eggs of her ducks every day?\n")["input_ids"]
    branches = engine.start([prompt])
    steps = []
    for text in (said, "She bakes muffins with 4 eggs, so 13 - 4 = 9 eggs remain.\n", said):
        # The logits allow only the tokens of the given step.
        tokens = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        with pytest.MonkeyPatch.context() as patch:
            drawn = iter(tokens)
            patch.setattr(draw_steps, "sample_logits", lambda logits, **_: only(logits, next(drawn)))  # noqa: B023
            request = dataclasses.replace(REQUEST, branch=branches[-1], max_tokens=len(tokens))
            [step] = engine.extend([request], never, embed=True)
        assert step.text == text
        branches.append(step.branch)
        steps.append(CheckedStep(step.text, step.embedding))
    check = RepetitionCheck()
    assert check([CheckedBranch("", steps[:1], steps[1]), CheckedBranch("", steps[:2], steps[2])]) == [False, True]


def only(logits, token):
    forced = torch.full_like(logits, -float("inf"))
    forced[:, token] = 0.0
    return sk.sample_logits(forced, seed=0, position=0)


@pytest.mark.slow
def test_engine_on_a_real_model():
    model, tokenizer = smollm2()
    engine = TransformersEngine(model, tokenizer)
    assert engine.is_batch_invariant(num_rows=24)
    question = "Anna has 3 apples and buys 4 more. She gives 2 to Tom. How many apples does Anna have?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    config = PathFinderConfig(branching_factor=4, beam=2, max_depth=2, max_step_tokens=12)
    together = PathFinder(engine, config).solve([prompt, "The capital of France is"])
    alone = PathFinder(engine, dataclasses.replace(config, batch_questions=1)).solve([prompt])
    assert nodes_of(alone[0].tree) == nodes_of(together[0].tree)
    assert "apples" in together[0].text
    assert engine.peak.unshared_bytes > 3 * engine.peak.shared_bytes
