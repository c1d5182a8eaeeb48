"""PLeaS: permuted models are the same model, a merge with one's permuted copy is it, both ends of the width, least squares."""

import copy

import pytest
import torch
from models import MODELS
from tiny import rng, seed, tiny
from torch import nn

from temperament import parts
from temperament.delta import Delta, Dense
from temperament.errors import UserError
from temperament.methods.merge._least_squares import Fit
from temperament.methods.merge._wide import Entries
from temperament.methods.merge.pleas import cost
from temperament.nn.groups import groups_of, permuted

TRANSFORMERS = ["llama", "llama_tied", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "vit"]
PLAIN = ["mlp", "cnn", "residual"]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.deep, self.b = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Conv2d(5, 6, 1)
        self.out = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.b(self.deep(torch.relu(self.a(x))))
        return self.out(torch.flatten(nn.functional.max_pool2d(x, 4), 1))


def plain(kind):
    torch.manual_seed(seed())
    if kind == "mlp":
        made = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    elif kind == "cnn":
        made = nn.Sequential(
            nn.Conv2d(1, 5, 3, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        )
    else:
        made = Residual()
    with torch.no_grad():
        for m in made.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), m.weight.uniform_(0.5, 2), m.bias.normal_()
    return made.eval()


def shaped(kind, rows=64):
    size = {"mlp": (7,), "cnn": (1, 7, 7), "residual": (1, 8, 8)}[kind]
    return torch.randn(rows, *size, generator=rng())


def make(kind):
    """(model, one input of it, its output)."""
    if kind in PLAIN:
        return plain(kind), shaped(kind), lambda m, x: m(x)
    return MODELS[kind].build(seed()), MODELS[kind].inputs(seed()), lambda m, x: MODELS[kind].output(m(**x))


def own(model):
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", PLAIN + TRANSFORMERS)
def test_permuting_leaves_the_function(kind):
    model, x, out = make(kind)
    groups = groups_of(model, x)
    names = {a.tensor for top in groups for g in top.walk() for a in g.axes}
    assert names >= {n for n, p in model.named_parameters() if p.dim() > 1}  # nothing is left out
    state = {
        n: v
        for n, v in model.state_dict().items()
        if n in own(model) or n not in dict(model.named_parameters(remove_duplicate=False))
    }
    orders = {g.name: torch.randperm(g.units) for top in groups for g in top.walk()}
    other = copy.deepcopy(model)
    other.load_state_dict(permuted(state, groups, orders), strict=False)
    with torch.no_grad():
        a, b = out(model, x), out(other, x)
    assert any(not torch.equal(p, q) for p, q in zip(own(model).values(), own(other).values(), strict=True))
    assert float((a - b).abs().max()) < 2e-5 * float(a.std())


def permuted_copy(model, x):
    groups = groups_of(model, x)
    orders = {g.name: torch.randperm(g.units) for top in groups for g in top.walk()}
    state = {
        n: v
        for n, v in model.state_dict().items()
        if n in own(model) or n not in dict(model.named_parameters(remove_duplicate=False))
    }
    other = copy.deepcopy(model)
    other.load_state_dict(permuted(state, groups, orders), strict=False)
    return other


@pytest.mark.parametrize("match", ["activations", "weights"])
@pytest.mark.parametrize("kind", [*PLAIN, "llama", "llama_tied", "qwen3", "gpt2", "vit"])
def test_a_model_merged_with_its_permuted_copy_is_itself(kind, match):
    model, x, _ = make(kind)
    other = permuted_copy(model, x)
    for solve in (False, True):
        method = parts.build({"merge.pleas": {"match": match, "solve": solve}})
        made = method.fuse([model, other], [x])
        for name, p in model.named_parameters():
            assert torch.allclose(dict(made.named_parameters())[name], p, atol=1e-4), (name, solve)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("solve", [False, True])
def test_full_width_is_the_ensemble(kind, solve):
    (a, x, out), b = make(kind), plain(kind)
    batches = [x] if kind == "mlp" else []  # batch norms are measured again where there are rows: another function
    solve = solve and bool(batches)
    for width in ({"apart": 1.0}, {"budget": 2.5}):
        method = parts.build({"merge.pleas": {"match": "weights", "solve": solve, "ridge": 1e-6, **width}})
        made = method.fuse([a, b], batches, example=x)
        with torch.no_grad():
            got, want = out(made, x), (out(a, x) + out(b, x)) / 2
        assert float((got - want).abs().max()) < 1e-4 * float(want.std())


def test_full_width_of_blocks_is_the_mean_of_blocks():
    """With one stream and equal norms: every block is the mean of both, at any input."""
    model, x, _ = make("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in other.named_parameters():
            if "proj" in n and "layers.1" in n:
                p.add_(0.02 * torch.randn(p.shape))
    made = parts.build({"merge.pleas": {"apart": 1.0, "solve": False}}).fuse([model, other], [x])
    assert made.config.intermediate_size == 2 * model.config.intermediate_size
    assert made.config.num_attention_heads == 2 * model.config.num_attention_heads
    h = torch.randn(2, 7, 32, generator=rng())
    at = torch.arange(7)[None]
    with torch.no_grad():
        place = model.model.rotary_emb(h, at)
        run = lambda m: m.model.layers[1](h, position_embeddings=place, position_ids=at)
        attention = lambda m: m.model.layers[1].self_attn(h, position_embeddings=place, attention_mask=None)[0]
        mlp = lambda m: m.model.layers[1].mlp(h)
        for f in (attention, mlp):
            assert torch.allclose(f(made), (f(model) + f(other)) / 2, atol=1e-5)
        assert run(made).shape == h.shape


def test_width_and_cost_follow_the_formula():
    a, b, x = plain("mlp"), plain("mlp"), shaped("mlp")
    groups = groups_of(a, x)
    for share in (0.25, 0.5):
        made = parts.build({"merge.pleas": {"apart": share}}).fuse([a, b], [x])
        assert [m.out_features for m in made if isinstance(m, nn.Linear)] == [
            int(12 + 12 * share + 0.5),
            int(9 + 9 * share + 0.5),
            4,
        ]
    r1, r2 = 3 / 12, 5 / 9
    want = (7 * 12 * (1 + r1) + 12 * 9 * ((1 + r1) * (1 + r2) - 2 * r1 * r2) + 9 * 4 * (1 + r2)) / (84 + 108 + 36)
    assert cost(dict(a.state_dict()), groups, {groups[0].name: 3, groups[1].name: 5}) == pytest.approx(want)
    for budget in (1.0, 1.2, 1.5):
        sizes = parts.build({"merge.pleas": {"budget": budget}})._apart(dict(a.state_dict()), groups)
        assert cost(dict(a.state_dict()), groups, sizes) <= budget
        more = {g: k + 1 for g, k in sizes.items()}
        assert cost(dict(a.state_dict()), groups, more) > budget  # and no more would fit


def test_the_table_of_blocks():
    """An entry of the result by the rule, one by one."""
    a, b, x = plain("mlp"), plain("mlp"), shaped("mlp")
    made = parts.build({"merge.pleas": {"apart": 0.5, "match": "weights", "solve": False}}).fuse([a, b], example=x)
    from temperament.methods.merge._matching import by_weights

    groups = groups_of(a, x)
    one, two = dict(a.state_dict()), dict(b.state_dict())
    orders, scores = by_weights(one, two, groups)
    there = permuted(two, groups, orders)
    rank = [scores[g.name].sort().indices for g in groups]
    alone = [set(r[: int(0.5 * len(r) + 0.5)].tolist()) for r in rank]
    lists = [
        [("m", u) for u in range(len(r)) if u not in s] + [(k, u) for k in "12" for u in range(len(r)) if u in s]
        for r, s in zip(rank, alone, strict=True)
    ]
    W, W1, W2 = made[2].weight, one["2.weight"], there["2.weight"]
    for i, (ki, u) in enumerate(lists[1]):
        for j, (kj, v) in enumerate(lists[0]):
            want = {"mm": (W1[u, v] + W2[u, v]) / 2, "m1": W1[u, v] / 2, "m2": W2[u, v] / 2, "1m": W1[u, v], "11": W1[u, v],
                    "2m": W2[u, v], "22": W2[u, v], "12": 0.0, "21": 0.0}[ki + kj]  # fmt: skip
            assert W[i, j].item() == pytest.approx(float(want), abs=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_least_squares_is_lstsq(ridge):
    """Row by row against torch.linalg.lstsq on the columns a row may read, ridge as extra rows."""
    r = rng()
    kind_in, kind_out = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2])
    m = nn.Linear(7, 4)
    x, y = torch.randn(50, 7, generator=r), torch.randn(50, 4, generator=r)
    fit = Fit(m, Entries(torch.arange(7), kind_in, "in"), Entries(torch.arange(4), kind_out, "out"))
    fit.add(x[:20], y[:20])
    fit.add(x[20:], y[20:])
    W0, b0 = m.weight.detach().clone(), m.bias.detach().clone()
    for o, k in enumerate(kind_out):
        for i, c in enumerate(kind_in):
            W0[o, i] *= not (k and c and k != c)
    W, b = fit.solve(W0, b0, ridge)
    X = torch.cat([x, torch.ones(50, 1)], 1).double()
    weight = ridge * float((X.T @ X).diagonal().mean())
    for o, k in enumerate(kind_out):
        read = [i for i, c in enumerate(kind_in) if not (k and c and k != c)] + [7]
        start = torch.cat([W0[o], b0[o : o + 1]]).double()[read]
        A = torch.cat([X[:, read], weight**0.5 * torch.eye(len(read), dtype=torch.float64)])
        t = torch.cat([y[:, o].double(), weight**0.5 * start])
        want = torch.linalg.lstsq(A, t[:, None]).solution[:, 0]
        got = torch.cat([W[o], b[o : o + 1]]).double()
        assert torch.allclose(got[read], want, atol=1e-5) and bool((got[[i for i in range(7) if i not in read]] == 0).all())
    assert fit.error(W, b) <= fit.error(W0, b0) + 1e-6
    brute = float((torch.nn.functional.linear(x, W, b) - y).square().sum())
    assert fit.error(W, b) == pytest.approx(brute, rel=1e-4)


def test_least_squares_of_convolutions_is_of_their_outputs():
    m = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    x = torch.randn(6, 3, 9, 9, generator=rng())
    with torch.no_grad():
        y = m(x)
    fit = Fit(m, Entries.same(3, "in"), Entries.same(4))
    fit.add(x, y)
    W, b = fit.solve(torch.randn(4, 3, 3, 3), torch.randn(4), 0.0)
    assert torch.allclose(W, m.weight, atol=1e-4) and torch.allclose(b, m.bias, atol=1e-4)


def test_error_on_the_rows_never_grows():
    """Layer outputs of the fitted merge are nearer to both models' than those of the average, map by map."""
    a, b, x = plain("mlp"), plain("mlp"), shaped("mlp", 200)
    mean = parts.build({"merge.pleas": {"solve": False, "apart": 0.3}}).fuse([a, b], [x])
    fitted = parts.build({"merge.pleas": {"apart": 0.3, "ridge": 0.0}}).fuse([a, b], [x])
    with torch.no_grad():
        want = (a(x) + b(x)) / 2
        assert float((fitted(x) - want).square().mean()) < float((mean(x) - want).square().mean())


def test_batch_norms_are_measured_again():
    a, b, x = plain("cnn"), plain("cnn"), shaped("cnn")
    made = parts.build("merge.pleas").fuse([a, b], [x, x])
    with torch.no_grad():
        h = made[0](x)
    assert torch.allclose(made[1].running_mean, h.mean((0, 2, 3)), atol=1e-4) and made[1].momentum == 0.1


def test_changes_of_one_base_and_refusals():
    base = tiny("llama")
    deltas = [Delta({n: Dense(0.01 * torch.randn(p.shape, generator=rng())) for n, p in base.parameters()}) for _ in range(2)]
    before = {n: p.detach().clone() for n, p in base.parameters()}
    merged = parts.build({"merge.pleas": {"match": "weights", "solve": False}}).merge(base, deltas)
    assert all(torch.equal(p, before[n]) for n, p in base.parameters())
    for n, w in before.items():  # near copies: nothing changes places, so it is the mean
        want = w + (deltas[0].changes[n].d + deltas[1].changes[n].d) / 2
        assert torch.allclose(merged.changes[n].apply(w), want, atol=1e-5), n
    same = parts.build({"merge.pleas": {"rows": 4, "length": 8}}).merge(base, [deltas[0]] * 2)
    assert all(torch.allclose(same.changes[n].apply(w), w + deltas[0].changes[n].d, atol=1e-4) for n, w in before.items())
    build = lambda **o: parts.build({"merge.pleas": o})
    with pytest.raises(UserError, match="it merges 2"):
        build().merge(base, deltas[:1])
    with pytest.raises(UserError, match="no change of the base"):
        build(apart=0.5).merge(base, deltas)
    with pytest.raises(UserError, match="one architecture and vocabulary"):
        build(match="weights", solve=False).fuse([plain("mlp"), plain("cnn")], example=shaped("mlp"))
    with pytest.raises(UserError, match="give rows"):
        build().fuse([plain("mlp"), plain("mlp")], example=shaped("mlp"))
    broken = plain("mlp")
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not all finite"):
        build(match="weights", solve=False).fuse([plain("mlp"), broken], example=shaped("mlp"))
    model, x, _ = make("bloom")  # ALiBi gives each head its own slope
    with pytest.raises(UserError, match="do not change places"):
        build(match="weights", solve=False).fuse([model, permuted_copy(model, x)], example=x)
    for kind in ("t5", "mixtral"):
        with pytest.raises(UserError):
            groups_of(MODELS[kind].build(0))
    bert, other = (MODELS["bert"].build(s) for s in (0, 1))  # its head has a map of its own between stream and vocabulary
    with pytest.raises(UserError, match="do not change places"):
        build(match="weights", solve=False).fuse([bert, other], example=MODELS["bert"].inputs())
