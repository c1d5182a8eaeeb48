"""The algebra of deltas, their use on weights, and their files."""

import json

import pytest
import torch
from torch import nn

from temperament.delta import Addition, Delta, Dense, Lazy, LowRank, Multiplied, Replace, open_source
from temperament.errors import UserError

from .test_change import IN, MAKE, OUT


def base():
    return {f"lm/{name}": torch.randn(OUT, IN) for name in MAKE}


def delta(lazy=False, **kw):
    changes = {f"lm/{name}": make() for name, make in MAKE.items()}
    return Delta(Lazy(changes, changes.__getitem__) if lazy else changes, base={"lm": "a" * 64}, **kw)


def same(x, y):
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], msg=name)


@pytest.mark.parametrize("lazy", [False, True])
def test_algebra(lazy):
    W, x, y = base(), delta(lazy), delta(lazy)
    new = x.apply(W)
    same((x * 0.5).apply(W), {n: W[n] + 0.5 * (new[n] - W[n]) for n in W})
    same((x + y).apply(W), {n: new[n] + y.apply(W)[n] - W[n] for n in W})
    same((0.3 * x - y * 2).apply(W), {n: W[n] + 0.3 * (new[n] - W[n]) - 2 * (y.apply(W)[n] - W[n]) for n in W})
    same(x.materialise(W).apply(W), new)
    same((x * 0.5).materialise(W).apply(W), (x * 0.5).apply(W))
    assert all(torch.equal((x * 0).apply(W)[n], W[n]) and (x * 0).apply(W)[n] is W[n] for n in W)
    if lazy:
        assert all(isinstance(d.changes, Lazy) for d in (x, x + y, x * 2, x.restrict(lambda n: True), x.remap({})))


@pytest.mark.parametrize("lazy", [False, True])
def test_mapped_is_the_same_expression_on_every_tensor(lazy):
    extra = {"lm/head": Addition("adapters.none", {"k": 2}, {"w": torch.randn(3)}, strength=0.4)}
    x = delta(lazy, additions=extra, buffers={"lm/mean": Replace(torch.randn(4))}, strength=0.7)
    same_ = x.mapped(torch.clone)
    assert same_.digest == x.digest and same_.strength == x.strength and isinstance(same_.changes, Lazy) == lazy
    assert [e[:3] for e in same_.entries()] == [e[:3] for e in x.entries()]
    assert {t.device.type for _, t in x.mapped(lambda t: t.to("meta")).tensors()} == {"meta"}


def test_restrict_and_rejoin():
    W, x = base(), delta()
    half = x.names[::2]
    first, second = x.restrict(half), x.restrict(lambda n: n not in half)
    assert first.names == half and not {*first.names} & {*second.names}
    same((first + second).apply(W), x.apply(W))
    assert (first + second).digest == x.digest
    with pytest.raises(UserError, match="dense"):
        x.restrict(["lm/dens"])


def test_numbers():
    x, W = delta(), base()
    assert x.parameters == sum(c.parameters for c in x.changes.values()) and x.bytes > x.parameters
    norms = (x * -2).norms(open_source(W))
    for name, change in x.changes.items():
        assert norms[name] == pytest.approx(2 * float(change.delta(W[name]).norm()), rel=1e-4)
    assert set(x.merges.values()) == {"exactly"}


def test_digest():
    x = delta()
    backwards = Delta(dict(reversed(list(x.changes.items()))))
    assert x.digest == backwards.digest == delta_copy(x).digest
    one = x.change("lm/dense").d
    one.view(-1)[0] += 1e-3
    assert x.digest != backwards.restrict(x.names[1:]).digest
    before = backwards.digest
    one.view(-1)[0] += 1
    assert backwards.digest != before


def delta_copy(x):
    return Delta({n: c.mapped(torch.clone) for n, c in x.changes.items()})


def test_remap():
    W, x = base(), delta().restrict(["lm/dense", "lm/sparse"])
    y = x.remap({"lm/dense": "emulator/dense"})
    assert y.names == ["emulator/dense", "lm/sparse"]
    new = y.apply({"emulator/dense": W["lm/dense"], "lm/sparse": W["lm/sparse"]})
    assert torch.equal(new["emulator/dense"], x.apply(W)["lm/dense"])
    with pytest.raises(UserError, match="name map"):
        x.remap(lambda name: "lm/x")


def test_bases():
    x = delta()
    assert x.check_base({"lm": "a" * 64, "codec": "z"}) is x
    with pytest.raises(UserError, match="transplant"):
        x.check_base({"lm": "b" * 64})
    moved = x.check_base({"lm": "b" * 64}, allow_transplant=True)
    assert moved.meta["transplanted"] == {"lm": {"from": "a" * 64, "to": "b" * 64}}
    assert moved.check_base({"lm": "b" * 64}) is moved
    with pytest.raises(UserError, match="base"):
        x + Delta({"lm/dense": Dense(torch.ones(OUT, IN))}, base={"lm": "c" * 64})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(IN, OUT), nn.BatchNorm1d(OUT), nn.Linear(OUT, IN)
        self.head.weight = self.embed.weight


def test_modules_in_place_and_back():
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lora = LowRank(torch.randn(2, IN), torch.randn(OUT, 2), layout="embedding")
    x = Delta(
        {"lm/embed.weight": lora, "lm/head.bias": Dense(torch.randn(IN))},
        buffers={"lm/norm.running_mean": torch.randn(OUT), "lm/norm.num_batches_tracked": torch.tensor(9)},
    )
    with x.applied(net):
        inside = {k: v.clone() for k, v in net.state_dict().items()}
        assert net.head.weight is net.embed.weight and not torch.equal(inside["head.weight"], before["head.weight"])
        assert int(net.norm.num_batches_tracked) == 9
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    (x * 0).apply(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x.apply(net)
    assert all(torch.equal(v, inside[k]) for k, v in net.state_dict().items())
    x.apply({"lm": Net()})


def test_nothing_half_done():
    net, W = Net(), torch.randn(IN, OUT)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    split = Delta({"lm/embed.weight": Dense(W), "lm/head.weight": Dense(-W), "lm/head.bias": Dense(torch.ones(IN))})
    wrong = Delta({"lm/embed.weight": Dense(W), "lm/head.bias": Dense(torch.ones(IN + 1))})
    unknown = Delta({"lm/embed.weight": Dense(W), "lm/head.bia": Dense(torch.ones(IN))})
    for bad, words in ((split, "tied"), (wrong, "shape"), (unknown, "head.bias")):
        with pytest.raises(UserError, match=words):
            bad.apply(net)
        with pytest.raises(UserError, match=words), bad.applied(net):
            pass
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    agreeing = Delta({"lm/embed.weight": Dense(W), "lm/head.weight": Dense(W)})
    agreeing.apply(net)
    torch.testing.assert_close(net.head.weight.detach(), before["embed.weight"] + W)  # once, not twice


def test_additions_need_their_part():
    x = Delta(additions={"lm/head2": Addition("adapters.head", {"width": 3}, {"w": torch.ones(3)})}, strength=0.5)
    with pytest.raises(UserError, match="module"):
        x.apply({"lm/w": torch.ones(2)})
    seen = []
    x.apply({"lm/w": torch.ones(2)}, build=lambda place, addition, to: seen.append((place, addition.strength)))
    assert seen == [("lm/head2", 0.5)] and x.merges == {"lm/head2": "never"}
    with pytest.raises(UserError, match="restrict"):
        x + x


def everything():
    x = delta(meta={"recipe": "r"}, strength=0.5)
    tensors = {"gate": torch.randn(3), "b.c": torch.randn(2)}
    return Delta(
        x.changes,
        {"lm/router": Addition("adapters.router", {"experts": [1, 2]}, tensors, strength=0.2)},
        {"lm/norm.running_mean": torch.randn(4), "lm/count": torch.tensor(3)},
        x.base, x.strength, x.meta,
    )  # fmt: skip


@pytest.mark.parametrize("lazy", [False, True])
def test_save_load_save(tmp_path, lazy):
    x, W = everything(), base()
    x.save(tmp_path / "a")
    y = Delta.load(tmp_path / "a", lazy=lazy)
    y.save(tmp_path / "b")
    for file in ("delta.json", "delta.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert y.digest == x.digest and (y.base, y.strength, y.meta) == (x.base, x.strength, x.meta)
    assert [entry[:3] for entry in y.entries()] == [entry[:3] for entry in x.entries()]
    only = [n for n in x.changes]
    old, new = x.restrict(only).apply(W), y.restrict(only).apply(W)
    assert all(torch.equal(old[n], new[n]) for n in W)
    with pytest.raises(UserError, match="not empty"):
        x.save(tmp_path / "a")
    x.save(tmp_path / "a", overwrite=True)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def tamper(folder, how):
    card, file = folder / "delta.json", folder / "delta.safetensors"
    if how == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "gone":
        file.unlink()
    elif how == "card gone":
        card.unlink()
    elif how == "card cut":
        card.write_text(card.read_text()[:-50])
    else:
        value = json.loads(card.read_text())
        exec(how, {"c": value, "name": next(iter(value["changes"]))})
        card.write_text(json.dumps(value))


TAMPERED = [
    "flip", "cut", "gone", "card gone", "card cut", "c['format'] = 'x'", "c['version'] = 9", "del c['changes']",
    "c['changes'] = []",
    "c['changes'][name]['kind'] = 'os.system'", "c['changes'][name]['scale'] = '1'", "c['changes'][name] = 3",
    "del c['sha256']",
    "c['changes'][name]['bogus'] = 1", "c['sha256'].popitem()", "c['sha256']['change:lm/x:d'] = 'a'", "c['strength'] = 'x'",
    "c['changes']['bare'] = c['changes'][name]", "c['strength'] = float('inf')", "c['additions']['lm/router']['x'] = 1",
]  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_delta_is_refused(tmp_path, how):
    everything().save(tmp_path / "a")
    tamper(tmp_path / "a", how)
    with pytest.raises(UserError) as error:
        Delta.load(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_a_lazy_delta_checks_what_it_reads(tmp_path):
    x = Delta({"lm/a": Dense(torch.ones(4)), "lm/b": Dense(torch.ones(4))})
    x.save(tmp_path / "a")
    tamper(tmp_path / "a", "flip")
    y = Delta.load(tmp_path / "a", lazy=True)
    y.change("lm/a")
    with pytest.raises(UserError, match="lm/b"):
        y.change("lm/b")


def test_other_devices_and_dtypes_follow_the_weight():
    W = torch.randn(OUT, IN).bfloat16()
    for change in (Dense(torch.randn(OUT, IN)), Replace(torch.randn(OUT, IN)), Multiplied(torch.randn(OUT, 1).double())):
        assert Delta({"lm/w": change}).apply({"w": W})["w"].dtype == torch.bfloat16


def test_tied_names_of_a_dict_move_together():
    net, W = Net(), torch.randn(IN, OUT)
    new = Delta({"lm/embed.weight": Dense(W)}).apply(net.state_dict())
    assert torch.equal(new["head.weight"], new["embed.weight"]) and torch.equal(new["embed.weight"], net.embed.weight + W)
    with pytest.raises(UserError, match="tied"):
        Delta({"lm/embed.weight": Dense(W), "lm/head.weight": Dense(-W)}).apply(net.state_dict())
