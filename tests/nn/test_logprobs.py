"""The streamed primitive against plain log-softmax, on tiny random models of every language family."""

import secrets
from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from temperament.errors import UserError
from temperament.nn import draws, forward, logprobs
from temperament.nn.batch import Tokens
from temperament.nn.context import context, current
from temperament.nn.logprobs import best, correct, entropy, kl, label, sample, score, top

V = 67
SPECIAL = dict(vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SMALL = (
    dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    | SPECIAL
)
WIDE = SMALL | dict(head_dim=8)
BERT = (
    dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64) | SPECIAL
)

DECODERS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**WIDE)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**WIDE, sliding_window=4, final_logit_softcapping=3.0)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**WIDE, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SMALL, logit_scale=0.25)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=3.0)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_local_experts=4)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SPECIAL)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**BERT)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            **SPECIAL,
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SPECIAL)),
}
MASKED = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**BERT | dict(pad_token_id=1, bos_token_id=0))),
}


def build(make, seed=None):
    """A random model with every parameter shaken, so that no term is zero; no dropout."""
    torch.manual_seed(secrets.randbits(30) if seed is None else seed)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def documents(count, low=2, high=9, first=0):
    """Token lists with random weights (the first token has none)."""
    docs = []
    for i in range(count):
        n = int(torch.randint(low, high + 1, ()))
        weights = torch.rand(n) * (torch.rand(n) < 0.7)
        weights[0], weights[-1] = 0, 0.5
        docs.append((torch.randint(5, V, (n,)), weights, first + i))
    return docs


def rows_of(groups, left=False):
    """One row for each group of documents, padded."""
    width = max(sum(len(ids) for ids, _, _ in g) for g in groups) + 1
    out = Tokens(
        torch.zeros(len(groups), width, dtype=torch.long),
        torch.zeros(len(groups), width),
        torch.full((len(groups), width), -1),
        torch.full((len(groups), width), -1),
    )
    for r, group in enumerate(groups):
        at = width - sum(len(ids) for ids, _, _ in group) if left else 0
        for s, (ids, weights, example) in enumerate(group):
            part = slice(at, at + len(ids))
            out.ids[r, part], out.weights[r, part], out.segments[r, part], out.examples[r, part] = ids, weights, s, example
            at += len(ids)
    return out


def plain(model, docs):
    """The weighted sum of log-probs, one document at a time, by the book; and each document's log-probs."""
    each = []
    for ids, weights, _ in docs:
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        each.append((logp[:-1].gather(-1, ids[1:, None])[:, 0] * (weights[1:] != 0), weights[1:]))
    return sum((v * w).sum() for v, w in each), [v for v, _ in each]


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(a, b, tol=1e-5):
    assert (a - b).norm() <= tol * b.norm(), float((a - b).norm() / b.norm())


@pytest.fixture(autouse=True)
def no_shortcut(monkeypatch):
    """Without this, everything tiny would take the straight path."""
    monkeypatch.setattr(logprobs, "SMALL", 0)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_padded_packed_left_chunked_and_alone_agree(name):
    model = build(DECODERS[name])
    docs = documents(6)
    expected, each = plain(model, docs)
    want = gradient(model, expected)
    layouts = {"padded": [[d] for d in docs], "alone": [docs[:1]], "packed": [docs[:3], docs[3:]]}
    for layout, groups in layouts.items():
        for left in (False, True) if layout == "padded" else (False,):
            tokens = rows_of(groups, left)
            if layout == "packed" and not forward.can_pack(model):
                with pytest.raises(UserError, match="pack"):
                    score(model, tokens)
                continue
            for chunk in (1, 3, 1000):
                got = score(model, tokens, label, chunk=chunk)
                assert got.streamed, got.why
                values = got["label"][tokens.mask].split([len(ids) for g in groups for ids, _, _ in g])
                for mine, theirs in zip(values, each, strict=False):
                    assert torch.allclose(mine[1:], theirs, atol=2e-6, rtol=1e-5)
                if layout != "alone":
                    close(gradient(model, (got["label"] * tokens.weights).sum()), want)


def test_which_families_pack():
    assert {n for n in DECODERS if not forward.can_pack(build(DECODERS[n]))} <= {"bloom"}
    assert "position" in forward.packing(build(DECODERS["bloom"])).reason


@pytest.mark.parametrize("name", MASKED)
def test_masked_models_predict_in_place(name):
    model = build(MASKED[name])
    docs = documents(4)
    holes = [torch.where(w != 0, torch.tensor(4), ids) for ids, w, _ in docs]
    each = [
        model(input_ids=h[None]).logits[0].log_softmax(-1).gather(-1, ids[:, None])[:, 0] * (w != 0)
        for h, (ids, w, _) in zip(holes, docs, strict=True)
    ]
    want = gradient(model, sum(v.sum() for v in each))
    for groups in ([[d] for d in docs], [docs[:2], docs[2:]]):
        tokens = rows_of(groups)
        given = {"input_ids": torch.where(tokens.weights != 0, torch.tensor(4), tokens.ids)}
        got = score(model, tokens, label(), given=given, chunk=2)
        assert torch.allclose(got["label"][tokens.mask], torch.cat(each), atol=2e-6, rtol=1e-5) and got.streamed
        close(gradient(model, got["label"].sum()), want)


def test_encoder_decoders_take_a_source():
    t5 = build(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0, **SPECIAL
            )
        )
    )
    whisper = build(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                d_model=16,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                num_mel_bins=8,
                max_source_positions=16,
                max_target_positions=32,
                decoder_start_token_id=3,
                **SPECIAL,
            )
        )
    )
    targets, sources = documents(4), documents(4)
    tokens = rows_of([[d] for d in targets])
    tokens.weights[:, 0] = 1.0  # here even the first token is predicted: from the start token
    audio = torch.randn(4, 8, 32)
    for model, given, one in (
        (t5, rows_of([[d] for d in sources]), lambda i: {"input_ids": sources[i][0][None]}),
        (whisper, {"input_features": audio}, lambda i: {"input_features": audio[i : i + 1]}),
    ):
        start = model.config.decoder_start_token_id
        each = []
        for i, (ids, _, _) in enumerate(targets):
            logits = model(**one(i), decoder_input_ids=torch.cat([torch.tensor([start]), ids[:-1]])[None]).logits[0]
            each.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0] * (tokens.weights[i, : len(ids)] != 0))
        want = gradient(model, torch.cat(each).sum())
        for chunk in (2, 1000):
            got = score(model, tokens, given=given, chunk=chunk)
            assert torch.allclose(got["label"][tokens.mask], torch.cat(each), atol=5e-6, rtol=1e-5) and got.streamed
            close(gradient(model, got["label"].sum()), want)
        assert not forward.can_pack(model)


def test_reducers():
    model, other = build(DECODERS["gemma2"]), build(DECODERS["llama"])
    docs = documents(5)
    tokens = rows_of([docs[:2], docs[2:3], docs[3:]])
    k_ids = torch.randint(0, V, (*tokens.ids.shape, 4))
    rows, cols = tokens.weights.nonzero(as_tuple=True)

    def logp(m):
        with torch.no_grad():
            return m(**forward.inputs(m, tokens)).logits[rows, cols - 1].log_softmax(-1)

    p, q = logp(model), logp(other)
    expected = {
        "label": p.gather(-1, tokens.ids[rows, cols, None])[:, 0],
        "top": p.gather(-1, k_ids[rows, cols]),
        "best": p.topk(3).values,
        "best_ids": p.topk(3).indices,
        "entropy": -(p.exp() * p).sum(-1),
        "correct": (p.argmax(-1) == tokens.ids[rows, cols]).float(),
        "kl": (q.exp() * (q - p)).sum(-1),
        "reverse": (p.exp() * (p - q)).sum(-1),
    }
    u = draws.uniform(7, "score-sample", 3, tokens.examples[rows, cols], tokens.positions[rows, cols])
    expected["sample"] = (p.exp().cumsum(-1) <= u[:, None]).sum(-1)
    for chunk in (1, 4, 1000):
        got = score(
            model,
            tokens,
            label,
            top(k_ids),
            best(3),
            entropy,
            correct,
            sample(7, 3),
            kl(other),
            kl(other, "reverse", name="reverse"),
            chunk=chunk,
        )
        assert set(got) == set(expected)
        for name, values in expected.items():
            assert torch.allclose(got[name][rows, cols], values, atol=1e-5, rtol=1e-4), name
            assert not got[name][tokens.weights == 0].any()
            assert got[name].dtype == values.dtype


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_gradient_of_kl_is_that_of_plain_kl(direction):
    model, other = build(DECODERS["llama-tied"]), build(DECODERS["gpt2"])
    tokens = rows_of([[d] for d in documents(4)])
    rows, cols = tokens.weights.nonzero(as_tuple=True)
    p, q = (m(**forward.inputs(m, tokens)).logits[rows, cols - 1].log_softmax(-1) for m in (model, other))
    q = q.detach()
    plainly = (
        F.kl_div(p, q, log_target=True, reduction="sum")
        if direction == "forward"
        else F.kl_div(q, p, log_target=True, reduction="sum")
    )
    want = gradient(model, plainly)
    for chunk in (2, 1000):
        close(gradient(model, score(model, tokens, kl(other, direction), chunk=chunk)["kl"].sum()), want)
    assert all(p.grad is None for p in other.parameters())
    assert score(model, tokens, kl(model, direction))["kl"].abs().max() < 1e-5


def test_temperature_of_kl():
    model, other = build(DECODERS["llama"]), build(DECODERS["llama"])
    tokens = rows_of([[d] for d in documents(3)])
    rows, cols = tokens.weights.nonzero(as_tuple=True)
    p, q = ((m(**forward.inputs(m, tokens)).logits[rows, cols - 1] / 2.5).log_softmax(-1) for m in (model, other))
    want = (q.exp() * (q - p)).sum(-1)
    assert torch.allclose(score(model, tokens, kl(other, temperature=2.5), chunk=3)["kl"][rows, cols], want, atol=1e-5)


class Wrapped(nn.Module):
    """An adapter around the head, as an adapter room would put it there."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(16, 2, bias=False), nn.Linear(2, V, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_an_adapter_on_the_head_and_a_hook_on_it_are_seen():
    model = build(DECODERS["gemma2"])
    model.set_output_embeddings(Wrapped(model.get_output_embeddings()))
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
    docs = documents(4)
    tokens = rows_of([[d] for d in docs])
    expected, _ = plain(model, docs)
    want = gradient(model, expected)
    got = score(model, tokens, chunk=3)
    assert got.streamed
    close(gradient(model, (got["label"] * tokens.weights).sum()), want)


class Dropping(Wrapped):
    """An adapter that drops half of what it reads in a training step, as LoRA with dropout does."""

    def forward(self, x):
        address = current().draws
        return self.base(x) + self.b(self.a(draws.dropout(x, 0.5, None if address is None else address.at("head"))))


def test_an_adapter_on_the_head_drops_what_it_would_of_whole_rows():
    model = build(DECODERS["gemma2"])
    model.set_output_embeddings(Dropping(model.get_output_embeddings()))
    tokens, seed = rows_of([[d] for d in documents(4)]), secrets.randbits(30)
    with context(draws=draws.Address(seed, "forward", 2, tokens.examples, tokens.positions)):
        logp = model(**forward.inputs(model, tokens)).logits[:, :-1].log_softmax(-1)
    want = (logp.gather(-1, tokens.ids[:, 1:, None])[..., 0] * tokens.weights[:, 1:]).sum()
    wanted = gradient(model, want)
    for chunk in (3, 1000):  # streamed, and in one piece
        with context(draws=draws.Address(seed, "forward", 2, torch.empty(0, dtype=torch.long))):
            got = score(model, tokens, chunk=chunk)
        assert got.streamed
        loss = (got["label"] * tokens.weights).sum()
        assert torch.allclose(loss, want, rtol=1e-5)
        close(gradient(model, loss), wanted)
    assert abs(float((score(model, tokens)["label"] * tokens.weights).sum() - want)) > 1e-3  # nothing drops outside of a step


class Version:
    """A view: scales one weight while active."""

    def __init__(self, module, factor):
        self.module, self.factor = module, factor

    @contextmanager
    def active(self):
        head = self.module.get_output_embeddings()
        hook = head.register_forward_hook(lambda m, args, out: out * self.factor)
        try:
            yield
        finally:
            hook.remove()

    def __call__(self, **inputs):
        return self.module(**inputs)


def test_views_are_current_in_forward_and_in_the_second_pass_of_backward():
    model = build(DECODERS["llama"])
    tokens = rows_of([[d] for d in documents(4)])
    rows, cols = tokens.weights.nonzero(as_tuple=True)
    logits = model(**forward.inputs(model, tokens)).logits[rows, cols - 1]
    p, q = (logits * 2).log_softmax(-1), (logits * 0.5).log_softmax(-1).detach()
    want = gradient(model, (q.exp() * (q - p)).sum())
    for chunk in (2, 1000):
        got = score(Version(model, 2.0), tokens, kl(Version(model, 0.5)), chunk=chunk)
        close(gradient(model, got["kl"].sum()), want)
        assert got.streamed


def test_what_cannot_be_streamed_is_right_and_says_so():
    class Odd(tf.LlamaForCausalLM):
        def forward(self, **kwargs):
            out = super().forward(**kwargs)
            out.logits = out.logits.sin()
            return out

    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))
            self.config = self.inner.config

        def forward(self, **kwargs):
            return self.inner(**kwargs)

    docs = documents(4)
    tokens = rows_of([[d] for d in docs])
    for make, why in ((lambda: Odd(tf.LlamaConfig(**SMALL)), "unknown way"), (Headless, "no output head")):
        model = build(make)
        expected, _ = plain(model, docs)
        want = gradient(model, expected)
        got = score(model, tokens, chunk=2)
        assert not got.streamed and why in got.why
        close(gradient(model, (got["label"] * tokens.weights).sum()), want)
        assert score(model, tokens, chunk=1000)["label"].allclose(got["label"], atol=1e-6)


def test_no_weight_anywhere_and_weight_on_the_first_token():
    model = build(DECODERS["llama"])
    tokens = rows_of([[d] for d in documents(2)])
    tokens.weights.zero_()
    got = score(model, tokens, label, entropy)
    assert got["label"].shape == tokens.ids.shape and not got["label"].any() and not got["entropy"].any()
    tokens.weights[0, 0] = 1
    with pytest.raises(UserError, match="first token"):
        score(model, tokens)


def test_bf16_softmax_is_in_fp32():
    model = build(DECODERS["llama"]).bfloat16()
    tokens = rows_of([[d] for d in documents(3)])
    rows, cols = tokens.weights.nonzero(as_tuple=True)
    for chunk in (2, 1000):
        got = score(model, tokens, label, entropy, chunk=chunk)
        logits = model(**forward.inputs(model, tokens)).logits[rows, cols - 1].float()
        want = logits.log_softmax(-1).gather(-1, tokens.ids[rows, cols, None])[:, 0]
        assert got["label"].dtype == torch.float32 and (got["label"][rows, cols] - want).abs().max() < 0.05


def test_memory_never_holds_all_logits():
    """Sizes of every tensor kept for the backward, and the peak of allocations in both passes, against n x V."""
    n, vocabulary, width, chunk = 4096, 50_000, 8, 64
    config = tf.LlamaConfig(**SMALL | dict(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1))
    model = build(lambda: tf.LlamaForCausalLM(config))
    ids = torch.randint(5, vocabulary, (64, 65))
    tokens = Tokens(ids, torch.ones(ids.shape), torch.zeros_like(ids), torch.zeros_like(ids))
    tokens.weights[:, 0] = 0
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    kept = 0

    def pack(t):
        nonlocal kept
        kept += t.numel() * t.element_size()
        return t

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as trace:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = score(model, tokens, chunk=chunk)["label"].sum()
        loss.backward()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    whole = n * vocabulary * 4
    assert kept < whole / 20 and peak < whole / 8, (kept / whole, peak / whole)
    assert model.model.norm.weight.grad.abs().sum() > 0
