"""Every merge method: one line in the table below gives it the properties it must have."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from temperament import parts
from temperament.delta import Delta, Dense, LowRank, between
from temperament.delta.merge_run import settle, stream
from temperament.delta.merging import BLOCK, Site, evaluate
from temperament.delta.stream import Checkpoint, open_source
from temperament.delta.tensorfile import Entry, Writer, write_tensors
from temperament.errors import UserError
from tests.models import MODELS

SHAPES = {
    "model.embed_tokens.weight": (700, 400),  # more than one block
    "model.layers.0.self_attn.q_proj.weight": (24, 40),
    "model.layers.0.norm.weight": (40,),
    "model.layers.1.mlp.up_proj.weight": (36, 24),
    "model.layers.1.mlp.bias": (1,),
    "model.norm.weight": (40,),
}


@dataclasses.dataclass
class Case:
    """What holds for a method. options: how it is built; n: models."""

    name: str
    options: dict = dataclasses.field(default_factory=dict)
    n: int = 3
    permutes: bool = True  # the order of equally weighted models does not matter
    same: bool = True  # models that are one model give that model
    linear: bool = True  # scaling every difference scales the result's
    inner: bool = True  # permuting the entries of tensors permutes the result's
    rests: bool = True  # no difference is no change
    tolerance: float = 1e-5


CASES = [
    Case("merge.linear"),
    Case("merge.linear", {"weights": [0.5, 0.2, 0.3], "scale": 0.7}, permutes=False, same=False),
    Case("merge.linear", {"of": "weights"}, linear=False),
    Case("merge.task_arithmetic", {"scale": 1 / 3}),
    Case("merge.ties", {"density": 1.0}),
    Case("merge.ties", {"density": 0.3}, same=False),
    Case("merge.ties", {"density": [0.1, 0.5, 0.9], "weights": [1, 2, 0.5]}, permutes=False, same=False),
    Case("merge.dare", {"density": 0.4}, permutes=False, same=False, inner=False),
    Case("merge.dare", {"density": 0.4, "elect": True, "normalise": True}, permutes=False, same=False, inner=False),
    Case("merge.della", {"density": 0.5, "epsilon": 0.2}, permutes=False, same=False, inner=False),
    Case("merge.breadcrumbs", {"density": 0.6, "gamma": 0.05}, same=False),
    Case("merge.breadcrumbs", {"density": 0.9, "gamma": 0.01, "elect": True}, same=False),
    Case("merge.slerp", {"t": 0.5}, n=2, linear=False),
    Case("merge.slerp", {"weights": [0.4, 0.4], "about": "base"}, n=2),
    Case("merge.nearswap", {"t": 0.05}, n=1, same=False, linear=False),
    Case("merge.multislerp"),
    Case("merge.multislerp", {"about": "zero"}, linear=False),
    Case("merge.karcher", linear=False),
    Case("merge.model_stock", n=4),
    Case("merge.model_stock", {"by": "row"}),
    Case("merge.sce", {"density": 0.7}, same=False),
    Case("merge.sce", linear=False),  # the floor of the energies is absolute
    Case("merge.passthrough", n=1, linear=False),
    Case("merge.passthrough", {"scale": 0.9}, n=1, same=False, linear=False, rests=False),
    Case("merge.linear", {"of": "weights", "normalise": False}, n=2, same=False, linear=False, rests=False),
    Case("merge.soup_uniform"),
    Case("merge.lines", same=False),
    Case("merge.lines", {"of": {"merge.ties": {"density": 0.3}}, "alpha": 0.4, "beta": 0.5}, same=False),
    Case("merge.lines", {"of": "merge.karcher", "alpha": 0.4}, same=False, linear=False),
    Case("merge.lines", {"of": {"merge.ties": {"density": 0.3}}, "alpha": None, "beta": 0.9}, same=False),
    Case("merge.lines", {"of": {"merge.sparse_sum": {"density": 0.1}}, "alpha": None}, same=False),
    Case("merge.lines", {"of": {"merge.linear": {"of": "weights"}}, "alpha": None}, linear=False),
    Case("merge.sparse_sum", {"density": 0.1}, same=False),
    Case("merge.sparse_sum", {"weights": [1, 1, -1]}, permutes=False, same=False),
    Case("merge.half_reset", {"share": 0.5}, n=1, same=False, linear=False),
    Case("merge.scale_intruders", {"factor": 0.3, "eps": 0.9}, n=1, same=False, linear=False, inner=False),
    Case("merge.compeft", {"density": 0.2}, n=1, same=False),
    Case("merge.compeft", {"density": 0.3, "by": "mean"}, n=1, same=False),
    Case("merge.lines", {"of": {"merge.compeft": {"density": 0.2}}}, n=1, same=False),
    Case("merge.lines", {"of": {"merge.passthrough": {"scale": 0.9}}}, n=1, same=False, linear=False, rests=False),
]
IDS = [f"{c.name}-{'-'.join(f'{k}={v}' for k, v in c.options.items())}" for c in CASES]


def build(case, **more):
    return parts.build({case.name: {**case.options, **more}})


def random_state(generator, like=None, size=0.1):
    return {k: (0 if like is None else like[k]) + size * torch.randn(s, generator=generator) for k, s in SHAPES.items()}


@pytest.fixture(scope="module")
def models():
    g = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    base = random_state(g, size=1.0)
    return base, [random_state(g, base) for _ in range(4)]


def differences(base, tuned):
    return Delta({f"lm/{k}": Dense(tuned[k] - base[k]) for k in base})


def merged(method, base, tuned):
    """{name: tensor} of base + merge."""
    delta = method.merge(base, [differences(base, t) for t in tuned])
    return delta.apply({f"lm/{k}": v for k, v in base.items()})


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.allclose(a[k], b[k], rtol=tolerance, atol=tolerance), (k, float((a[k] - b[k]).abs().max()))


@pytest.fixture(params=CASES, ids=IDS)
def case(request):
    return request.param


def folders(tmp_path, base, tuned, **options):
    for i, state in enumerate([base, *tuned]):
        (tmp_path / str(i)).mkdir()
        write_tensors(tmp_path / str(i), state, **options)
    return Checkpoint(tmp_path / "0"), [Checkpoint(tmp_path / str(i + 1)) for i in range(len(tuned))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_is_in_memory_bit_for_bit(case, models, tmp_path, dtype):
    base, tuned = ({k: v.to(dtype) for k, v in s.items()} for s in (models[0], {})), models[1][: case.n]
    base = {k: v.to(dtype) for k, v in models[0].items()}
    tuned = [{k: v.to(dtype) for k, v in s.items()} for s in models[1][: case.n]]
    method = build(case)
    sources = folders(tmp_path, base, tuned, shard_bytes=500_000)
    with Writer(tmp_path, {k: Entry(dtype, s) for k, s in SHAPES.items()}) as writer:
        stream(method, sources[1], sources[0], writer, threads=3)
    written = open_source({k: Checkpoint(tmp_path).read(f"lm/{k}") for k in SHAPES})
    for lazy in (False, True):
        deltas = [between(base, t, lazy=lazy) for t in tuned]
        held = method.merge(base, deltas).apply({f"lm/{k}": v for k, v in base.items()})
        for k in SHAPES:
            assert torch.equal(held[f"lm/{k}"], written.read(f"lm/{k}")), k


def some_changed(base, tuned, i):
    """A model of which some tensors are the base's: others in each, one in none."""
    kept = [k for j, k in enumerate(base) if j in (0, 2) or (i + j) % 3 == 1]
    return {k: base[k] if k in kept else v for k, v in tuned.items()}


def test_streaming_is_in_memory_where_models_change_only_some_tensors(case, models, tmp_path):
    """A folder holds also what was not tuned; a delta of it names what was, or all (lazy): all three give one model."""
    base = models[0]
    tuned = [some_changed(base, t, i) for i, t in enumerate(models[1][: case.n])]
    method = build(case)
    sources = folders(tmp_path, base, tuned)
    with Writer(tmp_path, {k: Entry(torch.float32, s) for k, s in SHAPES.items()}) as writer:
        stream(method, sources[1], sources[0], writer, threads=2)
    written = {f"lm/{k}": Checkpoint(tmp_path).read(f"lm/{k}") for k in SHAPES}
    for lazy in (False, True):
        deltas = [between(base, t, lazy=lazy) for t in tuned]
        close(method.merge(base, deltas).apply({f"lm/{k}": v for k, v in base.items()}), written, 1e-6)


def low_rank(models, i):
    g = torch.Generator().manual_seed(i)
    names = [k for j, k in enumerate(k for k, s in SHAPES.items() if len(s) == 2 and "embed" not in k) if (i + j) % 3]
    draw = lambda *shape: torch.randn(shape, generator=g)
    return Delta({f"lm/{k}": LowRank(draw(2, SHAPES[k][1]), draw(SHAPES[k][0], 2), scale=0.3) for k in names})


@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_changes_are_written_upon_their_base_as_they_merge_in_memory(case, models, tmp_path, form):
    """Bit for bit, and where the form of a change means nothing, as its dense differences are streamed."""
    base, method = models[0], build(case)
    deltas = [low_rank(models, i + 1) for i in range(case.n)]
    if form == "dense":
        deltas = [d.materialise() for d in deltas]
    table = {k: Entry(torch.float32, s) for k, s in SHAPES.items()}
    with Writer(tmp_path, table) as writer:
        settle(method, open_source(base), deltas, writer, [f"lm/{k}" for k in SHAPES], threads=2)
    written = {f"lm/{k}": Checkpoint(tmp_path).read(f"lm/{k}") for k in SHAPES}
    full = {f"lm/{k}": v for k, v in base.items()}
    expected = method.merge(base, deltas).apply(full)
    assert all(torch.equal(written[k], expected[k]) for k in full)
    if "compeft" in f"{case.name}{case.options}":
        return
    (tmp_path / "all").mkdir()
    with Writer(tmp_path / "all", table) as writer:
        applied = [open_source({k[3:]: v for k, v in d.apply(full).items()}) for d in deltas]
        stream(method, applied, open_source(base), writer, threads=2)
    streamed = {k: Checkpoint(tmp_path / "all").read(k) for k in full}
    for k in full:  # an entry on a threshold may fall to either side, as a difference of sums is rounded
        odd = ~torch.isclose(streamed[k], expected[k], rtol=1e-4, atol=1e-5)
        assert int(odd.sum()) <= 2, (k, int(odd.sum()))


@pytest.mark.parametrize("method", ["merge.ties", "merge.dare", "merge.linear"])
def test_statistics_are_averaged_whatever_the_method_streamed_or_not(method, tmp_path):
    """A method that prunes would leave a variance of nothing; whole numbers are the first model's."""
    base, *tuned = ({k: v.detach().clone() for k, v in MODELS["resnet"].build(i).state_dict().items()} for i in range(4))
    names = [k for k in base if k.endswith(("running_mean", "running_var"))]
    for state in tuned:
        state |= {k: torch.rand(base[k].shape) + 0.5 for k in names}
        state |= {k: torch.randint(9, ()) for k in base if k.endswith("num_batches_tracked")}
    built = parts.build({method: {} if method == "merge.linear" else {"density": 0.3}})
    held = built.merge(base, [between(base, t) for t in tuned]).apply({f"lm/{k}": v for k, v in base.items()})
    sources = folders(tmp_path, base, tuned)
    with Writer(tmp_path, {k: Entry(v.dtype, tuple(v.shape)) for k, v in base.items()}) as writer:
        stream(built, sources[1], sources[0], writer)
    written = Checkpoint(tmp_path)
    assert names and all(torch.equal(held[f"lm/{k}"], written.read(f"lm/{k}")) for k in base)
    assert all(torch.equal(written.read(f"lm/{k}"), sum(t[k] for t in tuned) / 3) for k in names)
    whole = [k for k in base if k.endswith("num_batches_tracked")]
    assert whole and all(torch.equal(written.read(f"lm/{k}"), tuned[0][k]) for k in whole)


def test_order_of_models(case, models):
    if not case.permutes:
        pytest.skip("weighted or seeded by model")
    base, tuned = models[0], models[1][: case.n]
    close(merged(build(case), base, tuned), merged(build(case), base, tuned[::-1]), case.tolerance)


def test_one_model_many_times(case, models):
    if not case.same:
        pytest.skip("sparsifies or weighs")
    base, tuned = models[0], models[1][0]
    close(merged(build(case), base, [tuned] * case.n), {f"lm/{k}": v for k, v in tuned.items()}, case.tolerance)


def test_no_difference_is_the_base(case, models):
    base = models[0]
    if not case.rests:
        pytest.skip("scales weights")
    if any(word in f"{case.name} {case.options}" for word in ("'of': 'weights'", "slerp", "karcher")):
        return close(merged(build(case), base, [base] * case.n), {f"lm/{k}": v for k, v in base.items()}, 1e-5)
    out = merged(build(case), base, [base] * case.n)
    assert all(torch.equal(out[f"lm/{k}"], base[k]) for k in base)


def test_scales_with_the_differences(case, models):
    if not case.linear:
        pytest.skip("works on weights")
    base, tuned = models[0], models[1][: case.n]
    deltas = [differences(base, t) for t in tuned]
    one = build(case).merge(base, deltas)
    two = build(case).merge(base, [Delta({n: Dense(4 * c.d) for n, c in d.changes.items()}) for d in deltas])
    for name in one.changes:
        assert torch.allclose(4 * one.changes[name].delta(), two.changes[name].delta(), rtol=1e-4, atol=1e-5), name


def test_entries_permuted(case, models):
    if not case.inner:
        pytest.skip("draws by position")
    base, tuned = models[0], models[1][: case.n]
    small = [k for k in base if base[k].dim() == 2 and base[k].numel() < BLOCK]
    order = {k: torch.randperm(base[k].shape[0]) for k in small}
    of = lambda s: {k: s[k][order[k]] for k in small}
    plain = merged(build(case), {k: base[k] for k in small}, [{k: t[k] for k in small} for t in tuned])
    close({k: v[order[k[3:]]] for k, v in plain.items()}, merged(build(case), of(base), [of(t) for t in tuned]), 1e-5)


# ---- against brute force ---------------------------------------------------------------------------------------------------


def brute_trim(d, kept):
    flat = d.flatten().clone()
    flat[flat.abs().argsort(descending=True)[kept:]] = 0
    return flat.view_as(d)


def brute_elect(x, w, normalise):
    x = torch.stack([a * v for a, v in zip(w, x, strict=True)])
    sign = torch.where(x.sum(0) >= 0, 1.0, -1.0)
    agree = x.sign() == sign
    total = (x * agree).sum(0)
    votes = sum(a * m.float() for a, m in zip(w, agree, strict=True))
    return total / torch.where(votes == 0, 1.0, votes) if normalise else total


@pytest.mark.parametrize("density", [0.05, 0.2, 0.77, 1.0, 1e-9])
@pytest.mark.parametrize("w", [[1, 1, 1], [0.5, 2, 0.3], [1, -0.4, 1]])
def test_ties_by_sorting(models, density, w):
    base, tuned = models[0], models[1][:3]
    out = parts.build({"merge.ties": {"density": density, "weights": w}}).merge(base, [differences(base, t) for t in tuned])
    for k in base:
        n = base[k].numel()
        kept = n if density == 1 else max(1, int(density * n))
        expected = brute_elect([brute_trim(t[k] - base[k], kept) for t in tuned], w, True)
        sizes = [(t[k] - base[k]).abs() for t in tuned]  # entries as large as the last one kept: all are kept here, some there
        border = sum((v == v.flatten().sort(descending=True).values[max(kept, 1) - 1]).long() for v in sizes)
        same = torch.isclose(out.changes[f"lm/{k}"].d, expected, rtol=1e-5, atol=1e-7)
        assert bool((same | (border > 0)).all()) and int((~same).sum()) <= 20, k


def test_density_0_of_some_names_keeps_their_base(models):
    base, deltas = models[0], [differences(models[0], t) for t in models[1][:2]]
    rules = [{"filter": "norm", "value": 0}, {"value": 0.5}]
    for name in ("ties", "dare", "breadcrumbs", "della"):
        out = parts.build({f"merge.{name}": {"density": [rules, rules]}}).merge(base, deltas)
        assert all(bool(out.changes[n].d.any()) != ("norm" in n) for n in out.changes if out.changes[n].d.numel() > 1)


def test_ties_keeps_exactly_what_density_says(models):
    base, tuned = models[0], models[1][0]
    out = parts.build({"merge.ties": {"density": 0.3}}).merge(base, [differences(base, tuned)])
    for k in base:
        d = (tuned[k] - base[k]).abs()
        kept, last = int(out.changes[f"lm/{k}"].d.count_nonzero()), max(1, int(0.3 * d.numel()))
        equal = int((d == d.flatten().sort(descending=True).values[last - 1]).sum())
        assert last <= kept < last + max(equal, 1), k


def test_breadcrumbs_by_sorting(models):
    base, tuned = models[0], models[1][0]
    density, gamma = 0.6, 0.03
    out = parts.build({"merge.breadcrumbs": {"density": density, "gamma": gamma}}).merge(base, [differences(base, tuned)])
    for k in base:
        d = (tuned[k] - base[k]).flatten()
        n = d.numel()
        order = d.abs().argsort()
        first = max(0, n - int(density * n) - int(gamma * n))
        expected = torch.zeros(n)
        at = order[first : first + int(density * n)]
        expected[at] = d[at]
        got = out.changes[f"lm/{k}"].d.flatten()
        odd = got != expected  # entries equal in size to one at the border fall together
        ends = first, first + int(density * n)
        borders = {float(d.abs()[order[i % n]]) for end in ends for i in (end - 1, end)}
        assert set(d.abs()[odd].tolist()) <= borders, k


def test_sparse_methods_without_sparsity_are_task_arithmetic(models):
    base, deltas = models[0], [differences(models[0], t) for t in models[1][:3]]
    plain = parts.build("merge.task_arithmetic").merge(base, deltas)
    for name in ("breadcrumbs", "dare"):
        other = parts.build({f"merge.{name}": {"density": 1.0}}).merge(base, deltas)
        assert all(torch.equal(plain.changes[n].d, other.changes[n].d) for n in plain.changes)


def test_dare_keeps_the_mean_and_its_seed(models):
    base, delta = models[0], differences(models[0], models[1][0])
    name = "lm/model.embed_tokens.weight"
    d = delta.changes[name].d
    for p in (0.1, 0.5, 0.9):
        made = {s: parts.build({"merge.dare": {"density": p, "seed": s}}).merge(base, [delta]).changes[name].d for s in (0, 1)}
        again = parts.build({"merge.dare": {"density": p}}).merge(base, [delta]).changes[name].d
        assert torch.equal(made[0], again) and not torch.equal(made[0], made[1])
        share = float((made[0] != 0).float().mean())
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / d.numel())
        kept = made[0] != 0
        assert torch.allclose(made[0][kept], d[kept] * (65536 / round(p * 65536)))
        both = float(((made[0] != 0) & (made[1] != 0)).float().mean())
        assert abs(both - p * p) < 5 / math.sqrt(d.numel())


def test_della_keeps_the_large(models):
    base, delta = models[0], differences(models[0], models[1][0])
    name = "lm/model.embed_tokens.weight"
    d = delta.changes[name].d
    out = parts.build({"merge.della": {"density": 0.5, "epsilon": 0.3, "elect": False}}).merge(base, [delta]).changes[name].d
    rank = d.abs().argsort(1).argsort(1)
    high, low = (out != 0)[rank >= 300].float().mean(), (out != 0)[rank < 100].float().mean()
    assert abs(float(high) - 0.725) < 0.02 and abs(float(low) - 0.274) < 0.02
    assert abs(float(out.sum() - d.sum())) < 6 * 0.1 * math.sqrt(d.numel())


def slerp(a, b, t):
    a, b = a.double(), b.double()
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    return ((1 - t) * angle).sin() / angle.sin() * a + (t * angle).sin() / angle.sin() * b


def test_slerp(models):
    base, (a, b) = models[0], models[1][:2]
    a = {k: torch.randn(s) for k, s in SHAPES.items()}
    for t in (0.0, 0.3, 1.0):
        out = merged(parts.build({"merge.slerp": {"t": t}}), base, [a, b])
        back = merged(parts.build({"merge.slerp": {"t": 1 - t}}), base, [b, a])
        for k in base:
            if t in (0.0, 1.0):
                assert torch.equal(out[f"lm/{k}"], (a, b)[int(t)][k] - base[k] + base[k])
            elif base[k].numel() > 1:
                assert torch.allclose(out[f"lm/{k}"].double(), slerp(a[k], b[k], t), atol=1e-5), k
            assert torch.allclose(out[f"lm/{k}"], back[f"lm/{k}"], atol=1e-6)
    unit = {k: v / v.norm() for k, v in a.items()}
    other = {k: v / v.norm() for k, v in b.items()}
    out = merged(parts.build({"merge.slerp": {"t": 0.4}}), base, [unit, other])
    assert all(abs(float(out[f"lm/{k}"].norm()) - 1) < 1e-4 for k in base if base[k].numel() > 1)


def test_karcher_of_two_is_the_middle_of_the_arc(models):
    base = models[0]
    base = {k: v for k, v in base.items() if v.numel() > 1}  # two numbers of opposite sign have no middle
    a, b = ({k: v / v.norm() for k, v in random_state(None, size=1.0).items() if k in base} for _ in range(2))
    mean, arc = (merged(parts.build(m), base, [a, b]) for m in ("merge.karcher", "merge.slerp"))
    close(mean, arc, 1e-4)


def test_karcher_of_weight_on_zeros_alone_is_zero():
    base, tuned = {"w": torch.randn(3, 4)}, [{"w": torch.zeros(3, 4)}, {"w": torch.randn(3, 4)}]
    assert torch.equal(merged(parts.build({"merge.karcher": {"weights": [1.0, 0.0]}}), base, tuned)["lm/w"], torch.zeros(3, 4))


def test_karcher_is_stationary(models):
    base = {"w": torch.randn(30, 40)}
    tuned = [{"w": torch.randn(30, 40) + 1} for _ in range(4)]
    m = merged(parts.build({"merge.karcher": {"steps": 100, "tolerance": 1e-9}}), base, tuned)["lm/w"].double().flatten()
    m = m / m.norm()
    pull = torch.zeros_like(m)
    for t in tuned:
        u = t["w"].double().flatten() / t["w"].double().norm()
        angle = torch.acos(u @ m)
        pull += angle / angle.sin() * (u - (u @ m) * m)
    assert float(pull.norm()) < 1e-5


def test_stock_moves_further_the_more_models_agree():
    base = {"w": torch.zeros(200, 300)}
    common = torch.randn(200, 300)
    found = []
    for noise in (0.0, 1.0, 10.0):
        tuned = [{"w": common + noise * torch.randn(200, 300)} for _ in range(3)]
        out = merged(parts.build("merge.model_stock"), base, tuned)["lm/w"]
        found.append(float((out * common).sum() / common.square().sum()))
    assert found[0] == pytest.approx(1, abs=1e-5) and found[0] > found[1] > found[2]


def test_gradients_over_depth_and_rules_by_name(models):
    base, tuned = models[0], models[1][:1]
    rules = [{"filter": "q_proj", "value": 0.25}, {"value": [0.0, 1.0]}]
    out = parts.build({"merge.linear": {"scale": rules}}).merge(base, [differences(base, tuned[0])])
    of = lambda k: (out.changes[f"lm/{k}"].d / (tuned[0][k] - base[k])).flatten()[0].item()
    assert of("model.layers.0.self_attn.q_proj.weight") == pytest.approx(0.25)
    assert of("model.embed_tokens.weight") == 0 and of("model.layers.0.norm.weight") == 0
    assert of("model.layers.1.mlp.up_proj.weight") == pytest.approx(1) and of("model.norm.weight") == pytest.approx(1)
    assert evaluate([0, 0.5, 0.3, 0.7, 1], "x", 0.5) == pytest.approx(0.3) and evaluate([1, 0], "x", 0.25) == 0.75
    with pytest.raises(UserError, match="no rule fits"):
        evaluate([{"filter": "mlp", "value": 1}], "attn", 0)


def test_selection_is_exact():
    from temperament.delta.selection import kth_largest

    v = torch.cat([torch.randn(3 * BLOCK), torch.zeros(1000), torch.full((999,), 0.5)]).abs()[torch.randperm(3 * BLOCK + 1999)]
    order = v.sort(descending=True).values
    site = Site("lm/w", (v.numel(),), 1)

    class Fake:
        def __init__(self, start, stop):
            self.x = [v[start:stop]]

    for k in [1, 2, 1000, v.numel() // 5, v.numel() - 500, v.numel() - 1]:
        program = kth_largest(len(site.spans()), v.numel(), [k])
        asked = next(program)
        while True:
            try:
                parts_ = [asked.of(Fake(*span)) for span in site.spans()]
                asked = program.send([sum(p[i] for p in parts_) for i in range(len(parts_[0]))])
            except StopIteration as done:
                assert done.value[0] == order[k - 1]
                break


def test_lines_scales_by_depth(models):
    base, delta = models[0], differences(models[0], models[1][0])
    out = parts.build({"merge.lines": {"alpha": 0.25, "beta": 0.5}}).merge(base, [delta])
    factors = {"model.embed_tokens.weight": 0.25, "model.layers.0.norm.weight": 0.25, "model.layers.1.mlp.up_proj.weight": 0.75,
               "model.norm.weight": 0.75}  # fmt: skip
    for k, f in factors.items():
        assert torch.equal(out.changes[f"lm/{k}"].delta(), f * delta.changes[f"lm/{k}"].d), k
    same = parts.build({"merge.lines": {"alpha": 1.0, "beta": 0.0}}).merge(base, [delta])
    assert all(same.changes[n] is delta.changes[n] for n in delta.changes)


def test_half_reset_takes_half_of_each_category():
    g = torch.Generator().manual_seed(3)
    roles = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    shapes = {f"model.layers.{i}.{r}.weight": (4, 4) for i in range(4) for r in roles} | {"model.embed_tokens.weight": (9, 4)}
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    tuned = {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in base.items()}
    for share in (0.0, 0.5, 1.0):
        out = merged(parts.build({"merge.half_reset": {"share": share}}), base, [tuned])
        back = {k for k in base if torch.equal(out[f"lm/{k}"], base[k])}
        assert sum("attn" in k for k in back) == 16 * share and sum("mlp" in k for k in back) == 8 * share
        assert "model.embed_tokens.weight" not in back
    seeds = [parts.build({"merge.half_reset": {"seed": s}}).chosen(sorted(base)) for s in range(2)]
    assert seeds[0] != seeds[1]


def test_an_intruder_is_damped_and_nothing_else():
    U, S, V = torch.linalg.svd(torch.randn(20, 20))
    S = torch.linspace(10, 0.1, 20)
    base = (U[:, :10] * S[:10]) @ V[:10]
    tuned = base + 12.0 * torch.outer(U[:, 15], V[15])
    W = merged(parts.build({"merge.scale_intruders": {"factor": 0.25, "eps": 0.5}}), {"w": base}, [{"w": tuned}])["lm/w"]
    full = (U[:, :10] * S[:10]) @ V[:10] + 0.25 * 12.0 * torch.outer(U[:, 15], V[15])
    # the base has rank 10, so its other left vectors are arbitrary: give it a full spectrum to compare exactly
    del W, full
    base = (U * S) @ V
    new = torch.nn.functional.normalize(U.sum(1), dim=0)  # alike to no single direction
    tuned = base + 40.0 * torch.outer(new, V[3])
    W = merged(parts.build({"merge.scale_intruders": {"factor": 0.25, "eps": 0.5}}), {"w": base}, [{"w": tuned}])["lm/w"]
    u, s, v = torch.linalg.svd(tuned)
    assert torch.allclose(W, tuned - 0.75 * s[0] * torch.outer(u[:, 0], v[0]), atol=1e-4)
    same = merged(parts.build({"merge.scale_intruders": {"factor": 1.0}}), {"w": base}, [{"w": tuned}])["lm/w"]
    assert torch.allclose(same, tuned, atol=1e-6)


def test_compeft(models):
    base, delta = models[0], differences(models[0], models[1][0])
    flat = torch.cat([c.d.flatten() for c in delta.changes.values()])
    for density in (0.05, 0.2, 0.5):
        out = parts.build({"merge.compeft": {"density": density, "alpha": 2.0}}).merge(base, [delta])
        got = torch.cat([out.changes[n].delta().flatten() for n in delta.changes])
        kept, wanted = int(got.count_nonzero()), round(density * len(flat))
        assert wanted <= kept <= wanted + 20 and len(got.unique()) == 3
        assert got.abs().max() == pytest.approx(2 * float(flat.std(unbiased=False)), rel=1e-4)
        assert torch.equal(got[got != 0].sign(), flat[got != 0].sign())
        assert float(flat[got != 0].abs().min()) >= float(flat[got == 0].abs().max())
        got, exact = got.double(), flat.double()
        cosine = float(got @ exact / got.norm() / exact.norm())
        assert cosine == pytest.approx(float(exact.abs().sort().values[-kept:].sum() / kept**0.5 / exact.norm()), rel=1e-6)
        entropy = len(flat) * (-(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)) / 8
        assert out.bytes <= 1.04 * entropy + 16 * len(delta.changes), (out.bytes, entropy)


def test_rice_code_round_trips():
    from temperament.delta import Change, Rice

    for n, p in [(1, 1.0), (1, 0.0), (7, 0.5), (5000, 0.003), (5000, 0.9), (100_000, 0.1)]:
        signs = torch.randn(n).sign() * (torch.rand(n) < p)
        code = Rice.pack(signs.view(-1, 1), 0.5)
        assert torch.equal(code.signs.view(-1).float(), signs) and torch.equal(code.delta().view(-1), 0.5 * signs)
        again = Change.read(code.config(), code.tensors())
        assert torch.equal(again.delta(), code.delta()) and again.weight_shape == (n, 1)


def test_compressed_adapters(models, tmp_path):
    from temperament.delta import LowRank

    base = {"layers.0.w": torch.randn(200, 300)}
    delta = Delta({"lm/layers.0.w": LowRank(torch.randn(8, 300), torch.randn(200, 8), scale=2.0)})
    out = parts.build({"merge.compeft": {"density": 0.2}}).merge(base, [delta])
    out.save(tmp_path / "small")
    again = Delta.load(tmp_path / "small")
    assert torch.equal(again.changes["lm/layers.0.w"].delta(), out.changes["lm/layers.0.w"].delta())
    assert again.bytes < delta.bytes / 30
    from temperament.delta.lowrank import as_low_rank

    assert as_low_rank(again.change("lm/layers.0.w")).rank == 8


def test_sparse_sums_stay_sparse_and_do_not_meet():
    from temperament.delta import Sparse

    base = {"w": torch.randn(50, 40)}
    a, b = torch.zeros(50, 40), torch.zeros(50, 40)
    a[:10, :4], b[20:30, :4] = torch.randn(10, 4), torch.randn(10, 4)
    phi = [Delta({"lm/w": Sparse.of(v)}) for v in (a, b)]
    out = parts.build("merge.sparse_sum").merge(base, phi)
    assert isinstance(out.changes["lm/w"], Sparse) and len(out.changes["lm/w"].values) == 80
    assert torch.equal(out.changes["lm/w"].delta(), a + b)
    back = parts.build("merge.sparse_sum").merge(base, phi[::-1])
    assert torch.equal(back.changes["lm/w"].delta(), a + b)
    top = parts.build({"merge.sparse_sum": {"density": 0.01}}).merge(base, [phi[0]])
    assert len(top.changes["lm/w"].values) == 20


def test_greedy_soup():
    base = {"w": torch.zeros(3)}
    deltas = [Delta({"lm/w": Dense(torch.tensor(v))}) for v in ([1.0, 0, 0], [0, 0.9, 0], [0, 0, -9.0], [1.0, 1.0, 0])]
    target = torch.tensor([0.7, 0.7, 0.0])
    score = lambda d: -float((d.change("lm/w").delta() - target).norm())
    found, tried = parts.build("merge.soup_greedy").search(base, deltas, score)
    assert 2 not in tried["kept"] and tried["scores"] == sorted(tried["scores"])
    assert score(found) >= max(score(d) for d in deltas) and score(found) == pytest.approx(tried["scores"][-1])


SHARED = ("merge.linear", "merge.multislerp", "merge.karcher")


def test_refusals(models):
    base, deltas = models[0], [differences(models[0], t) for t in models[1][:3]]
    for method, message in [
        ({"merge.linear": {"weights": [1, 2]}}, "3 models are merged"),
        *(({name: {"weights": [1, -1, 0]}}, f"{name}.weights.*sum to 0") for name in SHARED),
        ("merge.slerp", "it merges 2"),
        ({"merge.della": {"density": 0.9, "epsilon": 0.2}}, "between 0 and 1"),
    ]:
        with pytest.raises(UserError, match=message):
            parts.build(method).merge(base, deltas)
    other = Delta({"lm/model.norm.weight": Dense(torch.zeros(41))})
    with pytest.raises(UserError, match=r"shape of lm/model\.norm"):
        parts.build("merge.ties").merge(base, [deltas[0], other])


def test_a_value_that_is_not_finite_stops_the_merge(models, tmp_path):
    base, tuned = models[0], [dict(m) for m in models[1][:2]]
    tuned[1]["model.norm.weight"] = torch.full((40,), np.nan)
    sources = folders(tmp_path, base, tuned)
    writer = Writer(tmp_path, {k: Entry(torch.float32, s) for k, s in SHAPES.items()})
    with pytest.raises(UserError, match="not all finite"):
        stream(parts.build("merge.linear"), sources[1], sources[0], writer)
    writer.close(finished=False)


# ---- closed forms written out, and weights -----------------------------------------------------------------------------


def fresh(n, size=0.1):
    """A base and n models' differences from it, drawn anew; without the tensor of one number, where directions are signs."""
    base = {k: torch.randn(s) for k, s in SHAPES.items() if math.prod(s) > 1}
    return base, [{k: size * torch.randn(v.shape) for k, v in base.items()} for _ in range(n)]


def result(spec, base, moved):
    """{name: what the merge changes}, fp64."""
    out = parts.build(spec).merge(base, [Delta({f"lm/{k}": Dense(v.clone()) for k, v in d.items()}) for d in moved])
    return {k: (out.change(f"lm/{k}").apply(v) - v).double() for k, v in base.items()}


@pytest.mark.parametrize("density", [1.0, 0.4, 0.03])
def test_sce_by_hand(density):
    base, moved = fresh(3)
    out = result({"merge.sce": {"density": density}}, base, moved)
    for k in base:
        spread = torch.stack([d[k] for d in moved]).var(0, unbiased=False)
        x, border = torch.stack([d[k] for d in moved]).double(), torch.zeros_like(spread, dtype=torch.bool)
        if density < 1:
            count = int(density * int((spread != 0).sum()))
            cut = spread.flatten().sort(descending=True).values[count - 1] if count else torch.inf
            x, border = x * (spread >= cut), (spread - cut).abs() <= 1e-6 * spread
        energy = x.square().flatten(1).mean(1)
        w = energy / energy.sum() if float(energy.sum()) > 0 else torch.full_like(energy, 1 / 3)
        columns, border, got = x.flatten(1).T, border.flatten(), out[k].flatten()
        for i in torch.randint(len(columns), (200,)).tolist():  # an entry at a time
            sign = 1.0 if float(columns[i].sum()) >= 0 else -1.0
            agree = [j for j in range(3) if float(columns[i, j]) * sign > 0]
            votes = sum(float(w[j]) for j in agree)
            expected = sum(float(w[j] * columns[i, j]) for j in agree) / votes if agree else 0.0
            assert bool(border[i]) or abs(float(got[i]) - expected) < 1e-6, (k, i)
        if density < 1:
            assert abs(int((out[k] != 0).sum()) - count) <= 2, k


@pytest.mark.parametrize("about", ["base", "zero"])
def test_multislerp_by_hand(about):
    base, moved = fresh(4)
    w = torch.rand(4, dtype=torch.float64) + 0.2
    out = result({"merge.multislerp": {"weights": w.tolist(), "about": about}}, base, moved)
    w = w / w.sum()
    for k, v in base.items():
        centre = v.double() if about == "zero" else torch.zeros_like(v, dtype=torch.float64)
        x = [(d[k].double() + centre).flatten() for d in moved]
        u = [a / a.norm() for a in x]
        m = sum(a * b for a, b in zip(w, u, strict=True))
        m = m / m.norm()
        t = sum(a * (b - (b @ m) * m) for a, b in zip(w, u, strict=True))
        point = t.norm().cos() * m + t.norm().sin() * t / t.norm()
        expected = (point * sum(a * b.norm() for a, b in zip(w, x, strict=True))).view(v.shape) - centre
        assert torch.allclose(out[k], expected, rtol=1e-4, atol=2e-6), (k, float((out[k] - expected).abs().max()))


@pytest.mark.parametrize("by", ["tensor", "row"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_model_stock_by_hand(by, n):
    base, moved = fresh(n)
    common = {k: 0.1 * torch.randn(v.shape) for k, v in base.items()}  # fine-tunes of one task have something in common
    moved = [{k: d[k] + common[k] for k in d} for d in moved]
    out = result({"merge.model_stock": {"by": by}}, base, moved)
    for k, v in base.items():
        rows = [d[k].double().reshape(len(v) if by == "row" and v.dim() > 1 else 1, -1) for d in moved]
        cosines = [torch.nn.functional.cosine_similarity(a, b, -1) for i, a in enumerate(rows) for b in rows[:i]]
        c = sum(cosines) / len(cosines)
        t = n * c / (1 + (n - 1) * c)
        expected = (t[:, None] * sum(rows) / n).view(v.shape)
        assert torch.allclose(out[k], expected, rtol=1e-4, atol=2e-6), (k, float((out[k] - expected).abs().max()))


# (options, may the models be permuted with their weights?): what is drawn is drawn by a model's place
NORMALISED = [
    ({"merge.linear": {}}, True),
    ({"merge.linear": {"of": "weights"}}, True),
    ({"merge.linear": {"scale": 0.6}}, True),
    ({"merge.task_arithmetic": {"normalise": True}}, True),
    ({"merge.ties": {"density": 0.4}}, True),
    ({"merge.breadcrumbs": {"density": 0.6, "normalise": True}}, True),
    ({"merge.breadcrumbs": {"density": 0.6, "normalise": True, "elect": True}}, True),
    ({"merge.multislerp": {}}, True),
    ({"merge.multislerp": {"about": "zero"}}, True),
    ({"merge.karcher": {}}, True),
    ({"merge.dare": {"density": 0.5, "normalise": True}}, False),
    ({"merge.dare": {"density": 0.5, "normalise": True, "elect": True}}, False),
    ({"merge.della": {}}, False),
]
SUMMED = [{"merge.task_arithmetic": {}}, {"merge.sparse_sum": {"density": 0.3}}, {"merge.breadcrumbs": {"density": 0.5}}]


def weighed(spec, base, moved, w):
    name, options = next(iter(spec.items()))
    return result({name: {**options, "weights": w}}, base, moved)


def alike(a, b):
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=2e-6) for k in a)


@pytest.mark.parametrize("spec", [s for s, _ in NORMALISED], ids=str)
def test_weights_that_are_normalised_count_by_their_ratio(spec):
    base, moved = fresh(3)
    w = (torch.rand(3) + 0.2).tolist()
    plain = weighed(spec, base, moved, w)
    for by in (0.01, 3.7):
        alike(plain, weighed(spec, base, moved, [by * a for a in w]))
    other = weighed(spec, base, moved, [2 * w[0], *w[1:]])
    assert any(not torch.allclose(plain[k], other[k], rtol=1e-3, atol=1e-5) for k in plain), "weights count at all"


@pytest.mark.parametrize("spec", [*(s for s, order in NORMALISED if order), *SUMMED], ids=str)
def test_models_permuted_with_their_weights(spec):
    base, moved = fresh(4)
    w, order = (torch.rand(4) + 0.2).tolist(), torch.randperm(4).tolist()
    alike(weighed(spec, base, moved, w), weighed(spec, base, [moved[i] for i in order], [w[i] for i in order]))


def test_every_part_that_normalises_weights_is_listed():
    listed = {name for spec, _ in NORMALISED for name in spec}
    assert {name for name in parts.names("merge") if hasattr(parts.get(name), "normalise")} <= listed


# what is no merge tensor by tensor has its tests in a file of its own
ELSEWHERE = {
    "merge.graft": "test_merge_learned.py",
    "merge.norm_statistics": "test_soups.py",
    "merge.pleas": "test_pleas.py",
    "merge.soup_greedy": "test_soups.py",
    "merge.soup_learned": "test_soups.py",
}


def test_every_part_has_a_case():
    """A new merge has the properties above, or a file of tests of its own."""
    cases = {case.name for case in CASES}
    assert not cases & ELSEWHERE.keys()
    assert cases | ELSEWHERE.keys() == set(parts.names("merge")), "add a Case, or name the file that tests it"
    for name, file in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert name in text, (name, file)


def test_lines_takes_the_papers_alpha():
    base, moved = fresh(3)
    l1 = lambda d: sum(float(v.double().abs().sum()) for v in d.values())
    total = l1({k: sum(d[k] for d in moved) for k in base})
    for of in ("merge.task_arithmetic", {"merge.ties": {"density": 0.3}}, "merge.linear", "merge.karcher"):
        inner = result(of if isinstance(of, dict) else {of: {}}, base, moved)
        alpha = total / (3 * l1(inner))
        assert alpha == pytest.approx({"merge.task_arithmetic": 1 / 3, "merge.linear": 1.0}.get(str(of), alpha), rel=1e-5)
        out = result({"merge.lines": {"of": of, "alpha": None, "beta": 0.7}}, base, moved)
        for k in base:
            depth = float("layers.1" in k or k == "model.norm.weight")
            assert torch.allclose(out[k], (alpha + 0.7 * depth) * inner[k], rtol=1e-4, atol=2e-6), (of, k)
    nothing = result(
        {"merge.lines": {"of": "merge.task_arithmetic", "alpha": None}}, base, [{k: 0 * v for k, v in base.items()}]
    )
    assert not any(bool(v.any()) for v in nothing.values())


@pytest.mark.parametrize("away", [0.0, 1e-7, 1e-5, 5e-4, 2e-3, 0.1])
def test_karcher_of_opposite_models_is_on_the_sphere(away):
    """Opposite, no arc is the shortest: it stays with the first. Nearly opposite, the result has the length it must have."""
    W = torch.randn(40, 30, dtype=torch.float64)
    side = torch.randn(40, 30, dtype=torch.float64)
    side -= (side * W).sum() / (W * W).sum() * W
    other = -math.cos(away) * W + math.sin(away) * side / side.norm() * W.norm()
    tensors = [{"w": v.float()} for v in (W, other)]
    deltas = [Delta({"lm/w": Dense(t["w"])}) for t in tensors]
    got = parts.build("merge.karcher").merge({"w": torch.zeros(40, 30)}, deltas).apply({"lm/w": torch.zeros(40, 30)})["lm/w"]
    assert math.isclose(float(got.norm()), float(W.norm()), rel_tol=1e-3)
    if away < 1e-3:
        assert torch.allclose(got.double(), W, rtol=1e-5, atol=1e-5)
