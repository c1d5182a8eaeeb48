"""Generation against transformers' own, against brute force, and against itself in other company."""

import math
import secrets
from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from scipy import stats
from torch import nn

from temperament.engine.session import How, Session, how
from temperament.engine.tokens import Sampling, choose, end_tokens, generate
from temperament.errors import UserError, WorkFailed
from temperament.nn import draws
from temperament.nn.logprobs import label, score

V = 67
SPECIAL = dict(vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, **SPECIAL)
LLAMA = dict(TINY, intermediate_size=24, num_key_value_heads=1)
WIDE = dict(LLAMA, head_dim=8, sliding_window=4)
GPT2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SPECIAL)

MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, sliding_window=4)),
    "mistral-wide": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, sliding_window=18)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**WIDE, final_logit_softcapping=3.0)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**WIDE, layer_types=["sliding_attention", "full_attention"])),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLAMA)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=4)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TINY, intermediate_size=24)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**TINY, word_embed_proj_dim=16, ffn_dim=24)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SPECIAL)),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, use_mambapy=False, **SPECIAL)
    ),
}


def build(name, dtype=torch.float32):
    """A random model. In fp64 the same computation in another batch cannot tip a choice between two tokens."""
    torch.manual_seed(secrets.randbits(30))
    model = MODELS[name]().eval().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def texts(count, low=1, high=9):
    return [torch.randint(5, V, (int(torch.randint(low, high + 1, ())),)).tolist() for _ in range(count)]


def alone(model, ids):
    """Log-probs of what follows ids and each of its prefixes, without a cache. (T, V)"""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1, dtype=torch.float32)


def near_tied(model, mine, theirs):
    """Equal, or parted where two tokens were equally probable to the last bits of fp32."""
    parted = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if parted is None:
        assert len(mine) == len(theirs)
    else:
        logp = alone(model, mine[:parted])[-1]
        assert abs(logp[mine[parted]] - logp[theirs[parted]]) < 1e-5 and logp[mine[parted]] > logp.max() - 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers_greedy(name):
    model, prompts = build(name), texts(7)
    out = generate(model, prompts, Sampling(max_new=12), batch=3)
    for prompt, ids, logp, why in zip(prompts, out.ids, out.logp, out.finished, strict=True):
        x = torch.tensor([prompt])
        whole = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False)[0].tolist()
        near_tied(model, prompt + ids, whole)
        assert why == ("eos" if ids[-1] == 2 else "length")
        want = alone(model, prompt + ids)[len(prompt) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert torch.allclose(logp, want, atol=2e-5)
    assert out.tokens == sum(map(len, out.ids))


def test_the_way_is_measured():
    for name in ("llama", "qwen2", "gpt2", "opt", "neox", "mixtral", "phi3"):
        assert how(build(name)) == How("slab", prepared=True)
    assert how(build("bloom")).cache == "slab" and not how(build("bloom")).prepared
    assert how(build("mistral")).window == 4 and how(build("mistral-wide")).window == 18


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_samples_depend_on_nothing_but_prompt_and_address(name):
    model, prompts = build(name, torch.float64), texts(12)
    prompts[5] = prompts[2]
    ids, seed = [secrets.randbits(40) for _ in prompts], secrets.randbits(30)
    sampling = Sampling(max_new=9, temperature=1.3, top_p=0.95)
    run = lambda p, e, **kw: generate(model, p, sampling, seed=seed, step=4, examples=e, **kw)
    whole = run(prompts, ids)
    for batch in (1, 5):
        again = run(prompts, ids, batch=batch)
        assert again.ids == whole.ids and again.finished == whole.finished
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(again.sampling_logp, whole.sampling_logp, strict=True))
    order = torch.randperm(12).tolist()
    assert run([prompts[i] for i in order], [ids[i] for i in order]).ids == [whole.ids[i] for i in order]
    assert run(prompts[3:4], ids[3:4]).ids == whole.ids[3:4]
    prefixes = [c[: len(c) // 2] for c in whole.ids]
    longer = Sampling(max_new=9 - min(map(len, prefixes)), temperature=1.3, top_p=0.95)
    rest = generate(model, prompts, longer, seed=seed, step=4, examples=ids, forced=prefixes, batch=7)
    for i, c in enumerate(whole.ids):
        assert rest.ids[i][: len(c)] == c and torch.allclose(rest.logp[i][: len(c)], whole.logp[i], atol=1e-4)
        assert rest.sampled[i].tolist() == [False] * len(prefixes[i]) + [True] * (len(rest.ids[i]) - len(prefixes[i]))
    other = generate(model, prompts, sampling, seed=seed, step=5, examples=ids)
    assert other.ids != whole.ids


def test_samples_follow_the_distribution():
    model, prompt = build("llama"), texts(1)[0]
    sampling = Sampling(max_new=1, temperature=0.8, top_k=20, top_p=0.9)
    out = generate(model, [prompt] * 4000, sampling, seed=secrets.randbits(30), eos=(), batch=2000)
    p = (alone(model, prompt)[-1] / 0.8).softmax(-1)
    order = p.argsort(descending=True)[:20]
    q = p[order] / p[order].sum()
    keep = order[q.cumsum(0) - q < 0.9]
    want = torch.zeros(V).index_copy(0, keep, p[keep] / p[keep].sum())
    counts = torch.bincount(torch.tensor([i[0] for i in out.ids]), minlength=V)
    assert counts[want == 0].sum() == 0
    assert stats.chisquare(counts[keep], 4000 * want[keep].double() / want[keep].double().sum()).pvalue > 1e-6
    drawn = torch.tensor([i[0] for i in out.ids])
    assert torch.allclose(torch.cat(out.sampling_logp), want.log()[drawn], atol=1e-4)
    assert torch.allclose(torch.cat(out.logp), alone(model, prompt)[-1][drawn], atol=1e-4)


def test_choose_filters_like_transformers():
    logits = 3 * torch.randn(50, V)
    for warper, sampling in (
        (tf.TopPLogitsWarper(0.7), Sampling(temperature=1.0, top_p=0.7)),
        (tf.TopKLogitsWarper(5), Sampling(temperature=1.0, top_k=5)),
        (tf.TemperatureLogitsWarper(0.6), Sampling(temperature=0.6)),
    ):
        want = warper(None, logits.clone()).softmax(-1)
        u = torch.rand(50)
        tokens, logp = choose(logits, sampling, u)
        p = want.gather(-1, tokens[:, None])[:, 0]
        assert (p > 0).all() and torch.allclose(logp, p.log(), atol=1e-5)
        below = want.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
        assert ((u < below + 1e-5) & (u >= below - p - 1e-5)).all()


def test_ends_stops_and_least_lengths():
    model, prompts = build("llama", torch.float64), texts(40)
    free = generate(model, prompts, Sampling(max_new=10, temperature=1.5), eos=())
    assert {len(c) for c in free.ids} == {10} and set(free.finished) == {"length"}
    common = free.ids[0][4]
    cut = generate(model, prompts, Sampling(max_new=10, temperature=1.5, stops=(common,)), eos=(free.ids[1][2],), batch=16)
    for c, full, why in zip(cut.ids, free.ids, cut.finished, strict=True):
        ends = [i for i, t in enumerate(full) if t in (common, free.ids[1][2])]
        assert c == (full[: ends[0] + 1] if ends else full)
        assert why == (("stop" if c[-1] == common and common != free.ids[1][2] else "eos") if ends else "length")
    late = generate(model, prompts, Sampling(max_new=10, min_new=6, temperature=1.5), eos=range(V - 5, V))
    assert all(len(c) > 6 or len(c) == 10 for c in late.ids)
    assert all(t < V - 5 for c in late.ids for t in c[:6])


def test_stop_strings():
    letters = lambda ids: "".join(chr(97 + i % 5) for i in ids)
    model, prompts = build("llama", torch.float64), texts(30)
    free = generate(model, prompts, Sampling(max_new=12, temperature=2.0), eos=())
    cut = generate(model, prompts, Sampling(max_new=12, temperature=2.0, stops=("ab", "cad")), eos=(), decode=letters)
    for c, full, why in zip(cut.ids, free.ids, cut.finished, strict=True):
        hits = [i for i in range(1, 13) if any(w in letters(full[:i]) for w in ("ab", "cad"))]
        assert c == (full[: hits[0]] if hits else full) and why == ("stop" if hits else "length")
    assert "stop" in cut.finished


def test_end_tokens_of_a_list():
    model = build("llama")
    assert end_tokens(model) == (2,)
    model.generation_config.eos_token_id = [2, 7]
    assert end_tokens(model) == (2, 7)


def test_the_first_token_can_be_forced_and_is_scored():
    model, prompts, forced = build("gpt2"), texts(6), [*texts(5, 1, 4), []]
    out = generate(model, prompts, Sampling(max_new=3), forced=forced, eos=())
    for p, f, c, logp in zip(prompts, forced, out.ids, out.logp, strict=True):
        assert c[: len(f)] == f and len(c) == len(f) + 3
        want = alone(model, p + c)[len(p) - 1 : -1]
        assert torch.allclose(logp, want.gather(-1, torch.tensor(c)[:, None])[:, 0], atol=2e-5)
        assert c[len(f) :] == want[len(f) :].argmax(-1).tolist()


class Difference:
    """Emulated tuning: first + scale * (second - third)."""

    def logits(self, state):
        a, b, c = (state.logits[n].log_softmax(-1) for n in ("a", "b", "c"))
        return a + 0.5 * (b - c)


def test_models_in_lockstep_with_prompts_of_their_own():
    models = {"a": build("llama"), "b": build("bloom"), "c": build("gpt2")}
    prompts = {n: texts(5) for n in models}
    out = generate(models, prompts, Sampling(max_new=6), hooks=[Difference()], eos=(), batch=2)
    for i in range(5):
        said = []
        for _ in range(6):
            a, b, c = (alone(models[n], prompts[n][i] + said)[-1] for n in "abc")
            said.append(int((a + 0.5 * (b - c)).argmax()))
        assert out.ids[i] == said
        want = alone(models["a"], prompts["a"][i] + said)[-7:-1].gather(-1, torch.tensor(said)[:, None])[:, 0]
        assert torch.allclose(out.logp[i], want, atol=2e-5)


def test_hooks_force_stop_and_remember_by_row():
    class Tool:
        def on_token(self, state):
            for i, ids in enumerate(state.ids):
                state.scratch.setdefault(state.rows[i], []).append(ids[-1])
                if len(ids) == 2:
                    state.force(i, [11, 12, 13])

        def stop(self, state):
            self.seen = dict(state.scratch)
            return torch.tensor([len(ids) >= 6 + row % 3 for ids, row in zip(state.ids, state.rows, strict=True)])

    model, prompts, tool = build("llama"), texts(7), Tool()
    out = generate(model, prompts, Sampling(max_new=20, temperature=1.0), hooks=[tool], eos=(), batch=4)
    for i, (ids, sampled) in enumerate(zip(out.ids, out.sampled, strict=True)):
        assert ids[2:5] == [11, 12, 13] and sampled.tolist() == [True] * 2 + [False] * 3 + [True] * (1 + i % 3)
        assert len(ids) == 6 + i % 3 and out.finished[i] == "hook"
        assert out.sampling_logp[i][2:5].tolist() == [0.0] * 3 and (out.logp[i] < 0).all()
        assert tool.seen.get(i, ids) == ids
    assert out.tokens == sum(int(s.sum()) for s in out.sampled)


def test_a_rollout_scores_what_was_logged():
    model, prompts = build("qwen3"), texts(9)
    out = generate(model, prompts, Sampling(max_new=8, temperature=1.0), seed=1, forced=texts(9, 0, 2))
    tokens, logp, behaviour = out.batch(prompts, examples=range(100, 109))
    assert torch.allclose(score(model, tokens, label)["label"], logp * tokens.weights, atol=2e-5)
    assert torch.allclose(behaviour, logp * tokens.weights, atol=1e-6)  # nothing was filtered at temperature 1
    assert tokens.examples[3].max() == 103 and tokens.trained == out.tokens


@pytest.mark.parametrize("name", ["llama", "mistral", "mistral-wide", "gemma3", "bloom", "gpt2", "mamba"])
def test_a_session_is_a_tree_walked_exactly(name):
    """Random steps, extensions, selections, forks, rewinds and scores: always what each row says alone."""
    model = build(name)
    s = Session(model, texts(4), room=3)
    rows = s.ids

    def check(s, rows):
        assert s.ids == rows
        for row, logits in zip(rows, s.logits, strict=True):
            assert torch.allclose(logits.log_softmax(-1), alone(model, row)[-1], atol=3e-5)

    check(s, rows)
    for _ in range(25):
        act = ("step", "extend", "select", "fork", "rewind", "score")[int(torch.randint(6, ()))]
        if act == "step":
            new = torch.randint(5, V, (len(rows),))
            s.step(new)
            rows = [[*r, int(t)] for r, t in zip(rows, new, strict=True)]
        elif act in ("extend", "score"):
            more = texts(len(rows), 0, 3)
            found = getattr(s, act)(more)
            for r, m, f in zip(rows, more, found, strict=True):
                if m:
                    want = alone(model, r + m)[len(r) - 1 : -1].gather(-1, torch.tensor(m)[:, None])[:, 0]
                    assert torch.allclose(f, want, atol=3e-5)
                assert len(f) == len(m)
            if act == "extend":
                rows = [r + m for r, m in zip(rows, more, strict=True)]
        elif act == "select":
            index = torch.randint(len(rows), (int(torch.randint(1, 6, ())),)).tolist()
            s.select(index)
            rows = [rows[i] for i in index]
        elif act == "fork":
            index = torch.randint(len(rows), (3,)).tolist()
            branch = s.fork(index)
            branch.step(torch.full((3,), 9))
            check(branch, [rows[i] + [9] for i in index])
        else:
            counts = [int(torch.randint(0, min(len(r), 4), ())) for r in rows]
            counts = counts if torch.rand(()) < 0.5 else min(counts)
            s.rewind(counts)
            cut = [counts] * len(rows) if isinstance(counts, int) else counts
            rows = [r[: len(r) - c] for r, c in zip(rows, cut, strict=True)]
        check(s, rows)


@pytest.mark.parametrize("name", ["mistral", "mistral-wide", "gemma3"])
@pytest.mark.parametrize("room", [1, 3, 64])
def test_a_session_goes_on_past_its_window(name, room):
    """Prompts of unlike lengths, all within the window at first, some beyond it already in the end."""
    model, rows = build(name), texts(4, 1, 3)
    s = Session(model, rows, room=room)
    for _ in range(22):
        new = torch.randint(5, V, (4,))
        s.step(new)
        rows = [[*r, int(t)] for r, t in zip(rows, new, strict=True)]
        for row, logits in zip(rows, s.logits, strict=True):
            assert torch.allclose(logits.log_softmax(-1), alone(model, row)[-1], atol=3e-5)


@pytest.mark.parametrize("way", [How("slab", True), How("slab"), How("own"), How("none")])
def test_every_way_says_the_same(way):
    model, prompts = build("llama"), texts(5)
    s = Session(model, prompts, way=way)
    for _ in range(4):
        new = torch.randint(5, V, (5,))
        s.step(new)
        prompts = [[*p, int(t)] for p, t in zip(prompts, new, strict=True)]
        assert torch.allclose(s.logits.log_softmax(-1), torch.stack([alone(model, p)[-1] for p in prompts]), atol=1e-5)


def test_encoder_decoders_are_given_their_source():
    config = tf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, **SPECIAL)
    torch.manual_seed(secrets.randbits(30))
    model = tf.T5ForConditionalGeneration(config).eval().double()
    source = torch.randint(5, V, (4, 6))
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    out = generate(model, [[0]] * 4, Sampling(max_new=5), given={"input_ids": source, "attention_mask": mask}, batch=3)
    theirs = model.generate(source, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for ids, want in zip(out.ids, theirs.tolist(), strict=True):
        assert ids == want[1 : 1 + len(ids)]


def test_adapters_views_dropout_and_gradients():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.up = base, nn.Linear(16, base.out_features)

        def forward(self, x):
            return self.base(x) + nn.functional.dropout(self.up(x), 0.5, self.training)

    class View:
        def __init__(self, module):
            self.module = module

        @contextmanager
        def active(self):
            hook = self.module.get_output_embeddings().register_forward_hook(lambda m, args, out: -out)
            yield
            hook.remove()

        def __call__(self, **kwargs):
            return self.module(**kwargs)

    model, prompts = build("llama"), texts(3)
    for layer in model.model.layers:
        layer.self_attn.v_proj, layer.mlp.up_proj = Adapter(layer.self_attn.v_proj), Adapter(layer.mlp.up_proj)
    model.train()
    out = generate(View(model), prompts, Sampling(max_new=5), eos=())
    assert model.training and model.model.layers[0].mlp.up_proj.training
    model.eval()
    for p, c in zip(prompts, out.ids, strict=True):
        assert alone(model, p + c)[len(p) - 1 : -1].argmin(-1).tolist() == c

    class Push:
        def logits(self, state):
            self.grad = torch.autograd.grad(state.chosen.logsumexp(-1).sum(), model.model.norm.weight, retain_graph=True)[0]
            return state.chosen

    push = Push()
    generate(model, prompts, Sampling(max_new=3), hooks=[push], eos=(), grad=True)
    assert push.grad.abs().sum() > 0


def test_bad_requests_name_the_mend():
    model = build("llama")
    for field, run in {
        "sampling.top_p": lambda: Sampling(top_p=0),
        "sampling.min_new": lambda: Sampling(max_new=3, min_new=4),
        "prompts": lambda: generate(model, [[5], []], Sampling()),
        "examples": lambda: generate(model, [[5]], Sampling(), examples=[1, 2]),
        "sampling.stops": lambda: generate(model, [[5]], Sampling(stops=("x",))),
        "counts": lambda: Session(model, [[5, 6]]).rewind(2),
    }.items():
        with pytest.raises(UserError) as error:
            run()
        assert error.value.field == field
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(WorkFailed, match="finite"):
        generate(model, [[5, 6]], Sampling(max_new=2, temperature=1.0))
    assert generate(build("llama"), [], Sampling()).ids == []


def test_uniforms_are_the_documented_ones():
    model, prompt, seed = build("llama"), texts(1)[0], secrets.randbits(30)
    out = generate(model, [prompt], Sampling(max_new=6, temperature=1.0), seed=seed, step=3, examples=[77], eos=())
    u = draws.uniform(seed, "sample", 3, torch.tensor([77]), torch.arange(6))
    p = alone(model, prompt + out.ids[0])[len(prompt) - 1 : -1].exp()
    assert out.ids[0] == [int((row.cumsum(0) <= x).sum()) for row, x in zip(p, u, strict=True)]
