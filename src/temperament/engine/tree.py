"""Tree search over states (PUCT), many trees in lockstep: plain Python, no model in it.

    walks = [search(Node(), Puct(iterations=8)) for _ in prompts]
    in_lockstep(walks, expand)          expand(nodes): give each of these nodes its children, in one batch for all trees
    -> the choices of each tree         what stood to choose from at every node of the way it committed to

    select    argmax over children of   Q(s, a) + w p(a | s) sqrt(N(s)) / (1 + N(s, a))           the first of equals
    backup    Q(s, a) = v(s') - v(s) + gamma V(s'),   V(s) = sum_a max(1, N_a) Q_a / sum_a max(1, N_a)
    N         visits, the one under way counted; every visit of an inner node goes on to one of its children
    commit    to the child of most visits (times 1 + the spread of its own children's visits), then by Q, then by V

There is no random roll-out: an iteration goes down to a terminal node, expanding what it meets. After `iterations` of them (at
the root `first` times as many) the search commits to a child and goes on from there. Whoever expands gives the actions, their
prior p, the value v and whether a node is terminal. Source: Silver et al. 2017; in this form Xie et al. 2024 (paper 144).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Node:
    """children None: not expanded. value: v(s) of being here, not the mean that is learnt (V)."""

    action: Any = None
    parent: Node | None = None
    prior: float = 1.0
    value: float = 0.0
    terminal: bool = False
    children: list[Node] | None = None
    N: int = 0
    V: float = 0.0
    Q: float = field(init=False)

    def __post_init__(self):
        self.Q = self.reward

    @property
    def reward(self) -> float:
        return self.value - (self.parent.value if self.parent is not None else 0.0)

    @property
    def path(self) -> list[Node]:
        """From below the root to here."""
        return [*self.parent.path, self] if self.parent is not None else []

    @property
    def depth(self) -> int:
        return len(self.path)


@dataclass(frozen=True)
class Choice:
    """A node of the way and what its children were worth when one of them was taken: Q and N of each."""

    node: Node
    Q: list[float]
    N: list[int]
    taken: int


@dataclass(frozen=True)
class Puct:
    iterations: int = 8
    first: int = 4  # times as many at the root
    explore: float = 1.0  # w
    gamma: float = 1.0
    diverse: bool = True  # commit with the spread of visits as a factor

    def score(self, child: Node) -> float:
        return child.Q + self.explore * child.prior * math.sqrt(child.parent.N) / (1 + child.N)

    def backup(self, walk: Sequence[Node]) -> None:
        for node in reversed(walk):
            if node.children:
                weights = [max(1, c.N) for c in node.children]
                node.V = sum(w * c.Q for w, c in zip(weights, node.children, strict=True)) / sum(weights)
            node.Q = node.reward + self.gamma * node.V

    def commit(self, children: Sequence[Node]) -> int:
        def key(i: int) -> tuple[float, float, float]:
            counts = [c.N for c in children[i].children or ()]
            spread = max(counts) - min(counts) if counts and self.diverse else 0
            return children[i].N * (1 + spread), children[i].Q, children[i].V

        return max(range(len(children)), key=key)


Walk = Generator[Node, None, list[Choice]]


def search(root: Node, rule: Puct) -> Walk:
    """Yields the nodes it needs expanded, one at a time; returns the choices of the way it committed to."""
    here, choices = root, []
    while not here.terminal:
        for _ in range(rule.iterations * (rule.first if here is root else 1)):
            walk = [here]
            here.N += 1
            while not walk[-1].terminal:
                if walk[-1].children is None:
                    yield walk[-1]
                    assert walk[-1].children, "an expanded node has children, or is terminal"
                walk.append(max(walk[-1].children, key=rule.score))
                walk[-1].N += 1
            rule.backup(walk)
        taken = rule.commit(here.children)
        choices.append(Choice(here, [c.Q for c in here.children], [c.N for c in here.children], taken))
        here = here.children[taken]
    return choices


def in_lockstep(walks: Sequence[Walk], expand: Callable[[dict[int, Node]], None]) -> list[list[Choice]]:
    """Carry all walks out; expand({number of the tree: node}) is asked for what they all wait for at once."""
    done: list[list[Choice]] = [[] for _ in walks]
    waiting: dict[int, Node] = {}

    def resume(i: int) -> None:
        try:
            waiting[i] = next(walks[i])
        except StopIteration as end:
            waiting.pop(i, None)
            done[i] = end.value

    for i in range(len(walks)):
        resume(i)
    while waiting:
        expand(dict(waiting))
        for i in list(waiting):
            resume(i)
    return done
