from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from temperament.delta import Delta
from temperament.parts import build, part


@part("merge.soup_greedy", papers=["120"], declares=["tunes on development data"])
@dataclass(frozen=True)
class GreedySoup:
    """Models added to a mean one by one, the best first, each kept only if the held-out score does not fall.

        S = {best};  for the others in order of their score:  S <- S + i  if  score(mean(S + i)) >= score(mean(S))

    Never worse than the best single model on the held-out items. All models must come from one start. The score is the mean of the
    target skills on development items; merged without one it is the uniform soup. Source: Wortsman et al. 2022 (paper 120).
    """

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        return build("merge.linear").merge(base, deltas)

    def search(self, base: Any, deltas: Sequence[Delta], score: Callable[[Delta], float]) -> tuple[Delta, dict[str, Any]]:
        """The soup, and what was tried: {"order", "kept", "scores"} by index of the model."""
        mean = build("merge.linear")
        alone = [score(d) for d in deltas]
        order = sorted(range(len(deltas)), key=lambda i: -alone[i])
        kept, best, scores = [order[0]], alone[order[0]], [alone[order[0]]]
        for i in order[1:]:
            tried = score(mean.merge(base, [deltas[k] for k in [*kept, i]]))
            if tried >= best:
                kept, best = [*kept, i], tried
            scores.append(best)
        return mean.merge(base, [deltas[k] for k in kept]), {"order": order, "kept": kept, "alone": alone, "scores": scores}
