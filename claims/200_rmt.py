"""[200] RMT: over a long stream of domains a mean teacher with symmetric cross-entropy, held to the source, beats TENT.

A small network with BatchNorm that knows the sprite world meets it foggy, noisy, blurred, ... in turn and again, without
labels; it is asked of each picture before it learns from it. Both arms read the batch's statistics and are at their own best
rate, chosen on pictures of another seed. Beside them: the network as it is, and RMT with the plain cross-entropy."""

from temperament.run.claims import TUNED_ON, Claim

KINDS = ("fog", "noise", "blur", "contrast", "pixelate")
RATES = {"rmt": [1e-4, 3e-4, 1e-3, 3e-3], "tent": [3e-4, 1e-3, 3e-3, 1e-2]}


def recipe(arm: str, rate: float, seed: int, rows: int = 128, repeats: int = 4, **objective) -> dict:
    domains = [{"data.sprites": {"domain": k, "severity": 5, "seed": seed}} for k in KINDS]
    stream = {"domains": [*domains, {"data.sprites": {"domain": "shifted", "seed": seed}}], "rows": rows, "repeats": repeats}
    source = {"rollout.test_stream": stream | ({} if arm == "rmt" else {"versions": ["live"]})}
    train = {"source": source, "optimizer": {"optim.adamw": {"lr": rate}}, "batch": 64, "micro": 64, "epochs": 1}
    if arm == "rmt":
        head = {"adapters.projection_head": {"prototypes": {"data.sprites": {"rows": 1000, "seed": seed}}}}
        train |= {"objective": {"objectives.robust.rmt": objective}, "ema": 0.99}
        train |= {"trainable": ["select.full", "adapters.batch_statistics", head]}
    else:
        train |= {"objective": "objectives.robust.entropy_min"}
        train |= {"trainable": [{"select.full": {"only": ["norm"]}}, "adapters.batch_statistics"]}
    suites = [{"evaluate.prequential": {"of": source}}, "evaluate.pictures"]
    return {"base": "lab/cnn", "steps": [{"name": arm, "train": train}], "evaluation": {"items": 200, "suites": suites}}


def run(seed, lab):
    numbers = {}
    for arm, rates in RATES.items():
        rate = lab.rate(arm, lambda rate, arm=arm: recipe(arm, rate, TUNED_ON), rates)
        numbers[arm] = lab.tune(arm, recipe(arm, rate, seed), seed) | {"rate": rate}
    plain = lab.tune("plain", recipe("rmt", numbers["rmt"]["rate"], seed, reverse=0.0), seed)
    still = [s["before"] for s in numbers["rmt"]["skills"].values() if s["role"] == "target"]
    numbers["rmt"] |= {"plain_cross_entropy": plain["target"], "without_adapting": sum(still) / len(still)}
    return {"method": numbers["rmt"], "baseline": numbers["tent"]}


claim = Claim(
    paper="200",
    title="Robust Mean Teacher for Continual and Gradual Test-Time Adaptation",
    says="Over a long stream of changing domains its answers are right more often than those of entropy minimisation.",
    parts=("objectives.robust.rmt", "rollout.test_stream", "adapters.batch_statistics", "adapters.projection_head"),
    measure="target",
    better="higher",
    baseline="entropy minimisation on the norms (TENT), its own best rate",
    seeds=(0, 1, 2, 3, 4),
    run=run,
    note="The measure is accuracy before each update, over all domains and visits: it is of a model that adapts at test time.",
)
