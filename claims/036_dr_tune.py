"""[036] DR-Tune: a head that must also classify the base's features, moved to where the tuned ones are, generalises from few
pictures better than plain fine-tuning.

A network with BatchNorm learns eight figures it has never seen from ten pictures of each; it is asked about held-out ones. Each
way has its own best learning rate, chosen on a seed of its own. Beside it: the same bank without calibration, which the paper
finds to be worse, and what the base's own classes lost.
"""

from temperament.run.claims import Claim

FIGURES = {"data.sprites": {"figures": 8, "rows": 80}}
RATES = [3e-4, 1e-3, 3e-3]
WAYS = {
    "plain": [],
    "dr_tune": [{"regularizers.dr_tune": {"bank": 80}}],
    "uncalibrated": [{"regularizers.dr_tune": {"bank": 80, "calibrate": False}}],
}


def recipe(way: str, rate: float, steps: int = 150, items: int = 400) -> dict:
    return {
        "base": "lab/cnn",
        "steps": [{
            "name": "figures",
            "train": {
                "source": FIGURES,
                "objective": "objectives.classify.cross_entropy",
                "regularizers": WAYS[way],
                "trainable": ["select.full", {"adapters.class_head": {"of": FIGURES}}],
                "optimizer": {"optim.adamw": {"lr": {"schedules.cosine": {"peak": rate, "warmup": 10}}}},
                "batch": 16,
                "micro": 16,
                "steps": steps,
            },
        }],
        "evaluation": {
            "items": items,
            "suites": [{"evaluate.pictures": {"of": FIGURES}}, "evaluate.pictures"],
            "keep": False,
        },
    }  # fmt: skip


def run(seed, lab):
    found = {way: lab.best(way, lambda rate, w=way: recipe(w, rate), RATES, seed) for way in WAYS}
    points = {way: {"target": 100 * f["target"], "loss": f["loss"], "rate": f["rate"]} for way, f in found.items()}
    return {
        "method": points["dr_tune"] | {"uncalibrated": points["uncalibrated"]["target"]},
        "baseline": points["plain"],
    }


claim = Claim(
    paper="036",
    title="DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution Regularization with Semantic Calibration",
    says="A head that must classify the base's calibrated features too names held-out pictures better than plain fine-tuning.",
    parts=("regularizers.dr_tune",),
    measure="target",
    better="higher",
    baseline="fine-tuning without it, at its own best learning rate",
    note="Batch norms keep the base's statistics in both.",
    run=run,
)
