"""[246] HST: a pyramid beside a frozen vision transformer reads its blocks and learns better than full fine-tuning does.

A transformer that knows shapes learns handwritten digits from 100 pictures. Compared, on held-out digits: hierarchical
side-tuning with tuning every weight below a new head, each at its own best learning rate. Beside it: the variant without meta
tokens and norms, where no gradient goes through the base and its own classes lose nothing, and a linear probe.
"""

from temperament.run.claims import Claim

DIGITS = {"data.digits": {"rows": 100}}
HEAD = {"adapters.class_head": {"of": DIGITS}}
WAYS = {
    "hst": {"adapters.side.hst": {"of": DIGITS}},
    "beside": {"adapters.side.hst": {"of": DIGITS, "meta": False, "norms": False}},
    "full": ["select.full", HEAD],
    "probe": HEAD,
}
RATES = {"hst": [1e-3, 3e-3, 1e-2], "beside": [1e-3, 3e-3, 1e-2], "full": [3e-4, 1e-3, 3e-3], "probe": [1e-2, 3e-2]}


def recipe(way: str, rate: float, steps: int = 150, items: int = 300) -> dict:
    return {
        "base": "lab/vit",
        "steps": [{
            "name": "digits",
            "train": {
                "source": DIGITS,
                "objective": "objectives.classify.cross_entropy",
                "trainable": WAYS[way],
                "optimizer": {"optim.adamw": {"lr": {"schedules.cosine": {"peak": rate, "warmup": 10}}}},
                "batch": 16,
                "micro": 16,
                "steps": steps,
            },
        }],
        "evaluation": {
            "items": items,
            "suites": [{"evaluate.pictures": {"of": DIGITS}}, "evaluate.pictures"],
            "keep": False,
        },
    }  # fmt: skip


def run(seed, lab):
    found = {way: lab.best(way, lambda rate, w=way: recipe(w, rate), RATES[way], seed) for way in WAYS}
    points = {way: {"target": 100 * f["target"], "loss": f["loss"], "rate": f["rate"]} for way, f in found.items()}
    beside, probe = points["beside"], points["probe"]
    return {
        "method": points["hst"] | {"beside": beside["target"], "beside_loss": beside["loss"], "probe": probe["target"]},
        "baseline": points["full"],
    }


claim = Claim(
    paper="246",
    title="Hierarchical Side-Tuning for Vision Transformers",
    says="A hierarchical side network with few trained tensors in the base names a new domain better than full fine-tuning.",
    parts=("adapters.side.hst",),
    measure="target",
    better="higher",
    baseline="select.full with a new head, at its own best learning rate",
    note="Pictures of 16x16: the pyramid's first map is as fine as the base's own, so its finer ones are not at work.",
    run=run,
)
