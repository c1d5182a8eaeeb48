"""[081] Straggler layers: trimming the change of the layers that break the straight way makes a better interpolation.

Full fine-tuning on a new task at a careless rate, so that the way between base and tuned model bends. `diagnose.interpolation`
names the layers whose own way has a barrier, on rows of old and new tasks; half of their change is trimmed, and the result is
interpolated with the base (WiSE-FT) at the point that is best on development items. Compared: WiSE-FT of the whole change, at
its own best point. The number is the mean of the new task and of what the base knew.
"""

from temperament import parts
from temperament.run.claims import Claim
from temperament.run.diagnose import Subject
from temperament.run.scoring import Scorer

POINTS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
ROWS = {"data.lab": {"skills": ["shift", "copy", "sort", "add", "people"], "rows": 64}}


def recipe() -> dict:
    optimizer = {"optim.adamw": {"lr": {"schedules.constant": {"value": 1e-3, "warmup": 10}}}}
    train = {"source": {"data.lab": {"skills": ["shift"], "rows": 2000}}, "optimizer": optimizer, "batch": 16, "steps": 120}
    return {"base": "lab/lm", "steps": [{"name": "sft", "train": train}], "check": False,
            "evaluation": {"items": 60, "suites": [{"evaluate.lab": {"target": "shift"}}], "diagnose": []}}  # fmt: skip


def run(seed, lab):
    made = lab.run("full", recipe(), seed)
    base, delta = made.base, made.delta
    base.reset()
    found = parts.build({"diagnose.interpolation": {"data": ROWS, "rows": 64}}).diagnose(Subject(base, delta))
    held, test = (Scorer(made.recipe, base, 60, development) for development in (True, False))
    both = lambda scorer, d: 50 * ((s := scorer.summary(d))["target"] + s["retained"])

    def wise(change):
        tried = {a: change * a for a in POINTS}
        best = max(POINTS, key=lambda a: both(held, tried[a]))
        return {"both": both(test, tried[best]), "at": best}

    trimmed = parts.build(found["mend"]).merge(base, [delta]) if found["mend"] else delta
    told = {"barrier": found["barrier"], "stragglers": float(len(found["stragglers"]))}
    return {"method": wise(trimmed) | told, "baseline": wise(delta)}


claim = Claim(
    paper="081",
    title="In Search of the Successful Interpolation: On the Role of Sharpness in CLIP Generalization",
    says="Where some layers break the straight way from base to tuned model, trimming them makes a better interpolation.",
    parts=("diagnose.interpolation", "merge.ties", "merge.task_arithmetic"),
    measure="both",
    better="higher",
    baseline="WiSE-FT of the whole change at its own best point",
    seeds=(0, 1, 2),
    run=run,
    note="`barrier`: nats a token by which the way lies above its chord; `stragglers`: layers named",
    why="There is nothing to mend: at this scale no barrier lies between base and tuned model (0.0 nats above the chord).",
)
