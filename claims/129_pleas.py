"""[129] PLeaS: two networks of different origin and data made one of the same width; plain averaging destroys both.

Two small CNNs from different random starts learn scikit-learn's digits, one as they are, one turned by 90 degrees. Compared on
held-out digits of both kinds, as many of each: PLeaS at the same width with the average of the weights, at the share of each
model (0, 0.1, ... 1: the models themselves among them) that is best on training digits, its batch norms measured again as well.
Printed beside it: the permuted average, the data-free form, wider ones, and the ensemble.
"""

import torch
from torch import nn

from temperament import parts
from temperament.methods.merge.pleas import measure_norms
from temperament.run.claims import Claim

SHARES = [k / 10 for k in range(11)]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    block = lambda i, o, **how: [nn.Conv2d(i, o, 3, bias=False, **how), nn.BatchNorm2d(o), nn.ReLU()]
    layers = [*block(1, 16, padding=1), *block(16, 32, padding=1, stride=2), *block(32, 32, padding=1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10))


def digits(seed: int):
    """(train, test) of (images, labels): a third is held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return [(x[at], y[at]) for at in (order[: 2 * len(order) // 3], order[2 * len(order) // 3 :])]


def turned(data):
    return data[0].rot90(1, (2, 3)), data[1]


def trained(seed: int, data, epochs: int) -> nn.Module:
    model, (x, y) = network(seed), data
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    total = epochs * (len(y) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=order)[: 64 * (len(y) // 64)].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, *data) -> float:
    """Mean over the sets, per cent."""
    return 100 * sum(float((model(x).argmax(1) == y).float().mean()) for x, y in data) / len(data)


def mixed(a: nn.Module, b: nn.Module, share: float, batches) -> nn.Module:
    made = network(0).eval()
    state, other = a.state_dict(), b.state_dict()
    made.load_state_dict({n: (1 - share) * w + share * other[n] if w.is_floating_point() else w for n, w in state.items()})
    with torch.no_grad():
        measure_norms(made, batches)
    return made


def run(seed, lab, epochs=20):
    train, test = digits(seed)
    sets, seen = (test, turned(test)), (train, turned(train))
    a, b = trained(2 * seed + 1, seen[0], epochs), trained(2 * seed + 2, seen[1], epochs)
    # every batch holds both kinds, as the merged model will meet them
    rows = torch.cat([s[0] for s in seen])
    batches = list(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].split(200))
    fused = lambda **o: parts.build({"merge.pleas": o}).fuse(
        [a, b], batches if o.get("solve", True) or "match" not in o else (), rows[:1]
    )
    best = max((mixed(a, b, s, batches) for s in SHARES), key=lambda m: accuracy(m, *seen))
    half = lambda model: lambda x: model(x).softmax(1)
    both = lambda x: half(a)(x) + half(b)(x)
    numbers = {
        "accuracy": accuracy(fused(), *sets),
        "permuted_average": accuracy(fused(solve=False), *sets),
        "data_free": accuracy(fused(match="weights", solve=False), *sets),
        **{f"budget_{c:g}": accuracy(fused(budget=c), *sets) for c in (1.2, 1.55, 2.0)},
    }
    beside = {"plain_average": accuracy(mixed(a, b, 0.5, batches), *sets), "ensemble": accuracy(both, *sets),
              "own": (accuracy(a, sets[0]) + accuracy(b, sets[1])) / 2}  # fmt: skip
    return {"method": numbers, "baseline": {"accuracy": accuracy(best, *sets), **beside}}


claim = Claim(
    paper="129",
    title="PLeaS: Merging Models with Permutations and Least Squares",
    says="Two models of different origin merge at the same width by permutation and least squares far better than by averages.",
    parts=("merge.pleas",),
    measure="accuracy",
    better="higher",
    baseline="the weighted average of both, its share chosen on training digits, batch norms measured again",
    seeds=(0, 1, 2, 3, 4),
    run=run,
)
