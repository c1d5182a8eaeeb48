from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from temperament.engine.encoded import Encoded, EncodedPair, EncodedPrompt, collate
from temperament.engine.examples import Prompt
from temperament.engine.responses import TOGETHER, in_turn, judged, read_prompts, respond
from temperament.engine.session import Session
from temperament.engine.tokens import Sampling
from temperament.engine.tree import Choice, Node, Puct, in_lockstep, search
from temperament.errors import UserError, WorkFailed
from temperament.nn import draws
from temperament.nn.batch import Pairs
from temperament.parts import part
from temperament.protocols import Examples, Reward

BARREN = 8  # stages without a pair, one after the other, before it is said that there is nothing to learn


@part("rollout.mcts_steps", papers=["144"], modalities=("text",))
@dataclass(frozen=True)
class MCTSSteps:
    """MCTS-DPO: preference pairs of single reasoning steps, from a tree search over partial answers by the policy as it stands.

        state   prompt and steps so far; action: one step, up to a `separator`;  p(a | s) = exp( sum log pi(a) / tokens^length )
        value   v(s) = C / max(depth - 4, 1) + O;  O at whole answers, from 1 (right) to `wrong`;  C the policy's own judgement
        pair    at every node of the way the search commits to (engine/tree.py): the child of best Q against that of worst Q
        loss    objectives.preference.dpo from the first token that differs, doubt  min(1/2, N_l / (N_w + N_l)),  N visits

    A stage searches a tree for each of `stage` prompts in turn, all in lockstep, and trains on their pairs for `epochs` passes;
    the next stage's trees are those of the policy then. The last step of `depth` runs on to the end; depth 1 is preference
    learning on whole answers. Equal steps are one, and a step without an alternative is joined to what follows. C is 0 without
    a `judge`; then only children that were visited are compared. What a stage found is state: a run killed inside goes on with
    it. Give steps, and choose the reference as in any DPO. Source: Xie et al. 2024 (paper 144).
    """

    prompts: Examples  # rows with a prompt; an answer column (or completion) for the rewards
    rewards: list[Reward]  # what scores a whole answer, 0 to 1
    weights: list[float] = field(default_factory=list)  # one a reward; empty: all 1
    separator: str = "\n"  # a step ends with the token that completes it
    actions: int = 4  # steps sampled at a node
    root_actions: int = 0  # at the root; 0: twice as many
    depth: int = 5  # steps of an answer at most
    iterations: int = 4  # walks down the tree before a step is committed to
    first: int = 4  # times as many at the root
    explore: float = 1.0  # w, weight of the prior in the choice of a child
    gamma: float = 1.0  # discount
    length: float = 1.25  # exponent of the length in the prior; 1: the geometric mean of the tokens
    greedy: bool = True  # the first of the steps at a node is the most probable one
    wrong: float = -1.0  # O of a wrong answer
    judge: str | None = None  # ask the policy about partial answers: text with {prompt}, {answer}, {solution}; null: O alone
    yes: str = "yes"  # how its consent begins
    no: str = "no"  # and its refusal
    rejected: Literal["worst", "second", "random"] = "worst"  # which sibling the best one is preferred to
    margin: float = 0.0  # difference of Q that a pair must exceed
    doubt: bool = True  # smooth the label by visits
    stage: int = 32  # trees of a stage
    epochs: int = 1  # passes over what a stage found
    step_tokens: int = 32  # tokens of a step at most
    max_new: int = 64  # tokens of the last step at most
    temperature: float = 1.0  # of sampling

    yields: ClassVar = ("Pairs",)
    generates: ClassVar = True

    def __post_init__(self):
        if min(self.actions, self.depth, self.iterations, self.first, self.stage, self.epochs) < 1:
            raise ValueError("actions, depth, iterations, first, stage and epochs must be at least 1")
        if max(self.actions, self.root_actions) < 2 or self.root_actions < 0:
            raise ValueError("two actions at least: a step is judged against its siblings")
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards need as many weights, got {len(self.weights)}")
        if self.temperature <= 0:
            raise ValueError("temperature must be above 0: greedy steps are all alike")
        if not self.separator:
            raise ValueError("separator must not be empty")

    @property
    def together(self) -> int:
        """Steps that are sampled at once, at most."""
        return min(TOGETHER, self.stage * max(self.root_actions or 2 * self.actions, self.actions))

    @property
    def answer_tokens(self) -> int:
        """Of an answer, at most."""
        return (self.depth - 1) * self.step_tokens + self.max_new

    @property
    def puct(self) -> Puct:
        return Puct(self.iterations, self.first, self.explore, self.gamma)

    def open(self, ctx: Any) -> Stream:
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return self.prompts.suites() if hasattr(self.prompts, "suites") else []


class Stream:
    """found: pairs of the stage, [prompt, ids both begin with, chosen, rejected, doubt]; place: batches of it given so far."""

    def __init__(self, spec: MCTSSteps, ctx: Any):
        self.spec, self.ctx = spec, ctx
        self.prompts = read_prompts(spec.prompts.examples(ctx), ctx)
        self.stage, self.place, self.found, self.told = -1, 0, [], {}

    def batch(self, step: int, progress: Any = None) -> Pairs:
        passes = -(-len(self.found) // self.ctx.batch)
        if self.place >= passes * self.spec.epochs:
            self._begin()
            passes = -(-len(self.found) // self.ctx.batch)
        epoch, i = divmod(self.place, passes)
        order = draws.permutation(len(self.found), self.ctx.seed, f"mcts/{self.stage}", epoch).tolist()
        rows = [self.found[k] for k in order[i * self.ctx.batch : (i + 1) * self.ctx.batch]]
        self.place += 1
        pairs = collate([self._pair(*r[:4]) for r in rows])
        if self.spec.doubt:
            pairs.doubt = torch.tensor([r[4] for r in rows])
        return pairs

    def _pair(self, number: int, before: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair:
        ids = [*self.prompts[number].ids, *before]
        origin = self.prompts[number].origin
        side = lambda end: Encoded([*ids, *end], [0.0] * len(ids) + [1.0] * len(end), origin=origin, number=number)
        return EncodedPair(side(chosen), side(rejected))

    def _begin(self) -> None:
        for _ in range(BARREN):
            self.stage, self.place = self.stage + 1, 0
            numbers = in_turn(len(self.prompts), self.spec.stage, self.stage * self.spec.stage, self.ctx.seed)
            forest = Forest(self.spec, self.ctx, [self.prompts[n] for n in numbers], self.stage)
            ways = forest.grow()
            made = [(n, preference(c, self.spec, self._draw(k, c))) for k, n in enumerate(numbers) for c in ways[k]]
            self.found = [[n, *pair] for n, pair in made if pair]
            right = [way[-1].node.children[way[-1].taken].value > 0 for way in ways]
            self.told = {"tree_pairs": len(self.found), "tree_right": sum(right) / len(right)}
            self.told |= {"tree_nodes": forest.nodes, "tree_tokens": forest.tokens}
            if self.found:
                return
        where = f"{BARREN} stages of {self.spec.stage} trees"
        raise WorkFailed(f"{where} found no two steps of unlike value; give other prompts or more actions")

    def _draw(self, tree: int, choice: Choice) -> float:
        return float(draws.uniform(self.ctx.seed, "mcts/rejected", self.stage, torch.tensor(tree), choice.node.depth))

    def feedback(self, batches: list, row: dict) -> dict[str, float]:
        return self.told

    def state_dict(self) -> dict[str, Any]:
        return {"json": {"stage": self.stage, "place": self.place, "found": self.found, "told": self.told}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage, self.place, self.found, self.told = (state["json"][k] for k in ("stage", "place", "found", "told"))


class Forest:
    """The trees of a stage. A draw is addressed by stage, tree, node in the order of the tree's own growth, and action: what a
    tree becomes does not depend on those beside it."""

    def __init__(self, spec: MCTSSteps, ctx: Any, prompts: list[EncodedPrompt], stage: int):
        self.spec, self.ctx, self.prompts, self.stage = spec, ctx, prompts, stage
        self.grown, self.tokens = [0] * len(prompts), 0

    @property
    def nodes(self) -> int:
        return sum(self.grown)

    def grow(self) -> list[list[Choice]]:
        return in_lockstep([search(Node(), self.spec.puct) for _ in self.prompts], self.expand)

    def expand(self, waiting: dict[int, Node]) -> None:
        made: dict[int, list[tuple[list[int], float, bool]]] = {i: [] for i in waiting}
        for last in (False, True):
            here = {i: n for i, n in waiting.items() if (n.depth + 1 >= self.spec.depth) == last}
            for greedy in (True, False) if self.spec.greedy else (False,):
                self._say(here, last, greedy, made)
        fresh: list[tuple[int, Node]] = []
        for i, node in waiting.items():
            node.children = []
            for ids, logp, ended in made[i]:
                if all(ids != c.action for c in node.children):
                    prior = math.exp(logp / len(ids) ** self.spec.length)
                    node.children.append(Node(ids, node, prior, terminal=ended))
            fresh += [(i, c) for c in node.children]
            self.grown[i] += 1
        self._value(fresh)

    def _say(self, here: dict[int, Node], last: bool, greedy: bool, made: dict) -> None:
        """Steps from each of these nodes: the greedy one, or the sampled ones."""
        spec = self.spec
        which = lambda n: range(1) if greedy else range(int(spec.greedy), self._count(n))
        rows = [(i, n, k) for i, n in here.items() for k in which(n)]
        if not rows:
            return
        length, stops = (spec.max_new, ()) if last else (spec.step_tokens, (spec.separator,))
        sampling = Sampling(length, 0.0 if greedy else spec.temperature, stops=stops)
        texts = [[*self.prompts[i].ids, *said(n)] for i, n, _ in rows]
        examples = [(i << 32) + (self.grown[i] << 8) + k for i, _, k in rows]
        got = respond(self.ctx, self.ctx.live.view("live"), texts, sampling, self.stage, examples)
        self.tokens += sum(map(len, got.ids))
        for (i, _, _), ids, logp, why in zip(rows, got.ids, got.logp, got.finished, strict=True):
            made[i].append((ids, float(logp.sum()), last or why == "eos"))

    def _count(self, node: Node) -> int:
        return self.spec.actions if node.parent is not None else self.spec.root_actions or 2 * self.spec.actions

    def _value(self, fresh: list[tuple[int, Node]]) -> None:
        """v of new nodes, and with it the Q they begin with."""
        spec, decode = self.spec, self.ctx.base.tokenizer.decode
        texts = [decode(said(n), skip_special_tokens=True) for _, n in fresh]
        sure = self._judge([i for i, _ in fresh], texts) if spec.judge else [0.0] * len(fresh)
        for (i, node), text, c in zip(fresh, texts, sure, strict=True):
            node.value = c / max(node.depth - 4, 1)
            if node.terminal:
                node.value += spec.wrong + (1 - spec.wrong) * judged(spec.rewards, spec.weights, self.prompts[i], [text])[0]
            node.Q = node.reward

    def _judge(self, trees: list[int], texts: list[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) where the policy is asked about each partial answer."""
        tok, world = self.ctx.base.tokenizer, self.ctx.world
        asked = []
        for i, text in zip(trees, texts, strict=True):
            p = self.prompts[i]
            question = p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"]
            filled = self.spec.judge.format(prompt=question, answer=text, solution=p.meta.get("answer", ""))
            asked.append(Prompt(filled if isinstance(p.prompt, str) else [{"role": "user", "content": filled}]))
        ids = [p.ids for p in read_prompts(asked, self.ctx)]
        words = [tok(w, add_special_tokens=False)["input_ids"][0] for w in (self.spec.yes, self.spec.no)]
        if words[0] == words[1]:
            raise UserError("rollout.mcts_steps.yes", self.spec.yes, f"it begins with the same token as no ({self.spec.no!r})")
        sure: list[float] = []
        with world.autocast(), self.ctx.live.at("live") as model:
            for part in torch.arange(world.rank, len(ids), world.size).split(256):
                logits = Session(model, [ids[k] for k in part.tolist()], room=1).logits[:, words].float()
                sure += logits.softmax(-1)[:, 0].tolist()
        return world.gather_rows(sure, len(ids))


def said(node: Node) -> list[int]:
    """The ids of the answer up to this node."""
    return [t for n in node.path for t in n.action]


def joined(node: Node) -> list[int]:
    """The step into a node, with the steps after it as long as there is only one."""
    ids = list(node.action)
    while node.children and len(node.children) == 1:
        node = node.children[0]
        ids += node.action
    return ids


def preference(choice: Choice, spec: MCTSSteps, u: float) -> list | None:
    """[ids both begin with, chosen, rejected, doubt] at a node, or None where no child is worth less than the best; u in [0, 1)
    draws one."""
    known = [k for k in range(len(choice.Q)) if choice.N[k] or spec.judge]  # unjudged and never visited: it has no value yet
    ranked = sorted(known, key=lambda k: (choice.Q[k], choice.N[k], -k))
    if len(ranked) < 2:
        return None
    best, others = ranked[-1], ranked[:-1]
    other = {"worst": others[0], "second": others[-1], "random": others[int(u * len(others))]}[spec.rejected]
    if choice.Q[best] - choice.Q[other] <= spec.margin:
        return None
    good, bad = (joined(choice.node.children[k]) for k in (best, other))
    common = next((k for k, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    doubt = min(choice.N[other] / (max(1, choice.N[best]) + choice.N[other]), 0.5)
    return [said(choice.node) + good[:common], good[common:], bad[common:], doubt]
