"""MCTS-DPO: the search against a brute-force tree, the pairs it leaves, and a stage that survives a kill."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from temperament import parts
from temperament.bases.load import load
from temperament.engine.encode import encode
from temperament.engine.examples import Prompt
from temperament.engine.tree import Choice, Node, Puct, in_lockstep, search
from temperament.errors import UserError
from temperament.methods.objectives.preference.dpo import DPO
from temperament.methods.rollout.mcts_steps import Forest, MCTSSteps, joined, preference, said
from temperament.nn.batch import Pairs
from temperament.nn.logprobs import response
from tests.resuming import killed_and_resumed, recipe, same_to_the_bit
from tests.tiny import context, gradients, live, pairs, player, tiny
from tests.tiny import seed as fresh

STORY = {"data.lab": {"skills": ["story"], "rows": 40}}


# ---- the search, in plain Python ---------------------------------------------------------------------------------------------


class World:
    """A random tree of three levels with values and priors by path: what a search is let loose on."""

    def __init__(self, seed: int, breadth: int = 3, depth: int = 3):
        self.seed, self.breadth, self.depth = seed, breadth, depth

    def of(self, path: tuple) -> tuple[float, float]:
        r = random.Random(f"{self.seed}/{path}")
        return r.uniform(-1, 1), r.random()

    def expand(self, waiting):
        for node in waiting.values():
            path = tuple(n.action for n in node.path)
            node.children = []
            for k in range(self.breadth):
                value, prior = self.of((*path, k))
                node.children.append(Node(k, node, prior, value, terminal=len(path) + 1 == self.depth))


def by_hand(world: World, rule: Puct) -> list[tuple[dict, dict, int]]:
    """The same search again with dictionaries by path, every formula written out: (Q, N, taken) of each choice."""
    N, Q, V, grown = {}, {}, {}, set()
    v = lambda p: world.of(p)[0] if p else 0.0
    kids = lambda p: [(*p, k) for k in range(world.breadth)]
    here, out = (), []
    while len(here) < world.depth:
        for _ in range(rule.iterations * (rule.first if not here else 1)):
            walk, p = [here], here
            N[p] = N.get(p, 0) + 1
            while len(p) < world.depth:
                if p not in grown:
                    grown.add(p)
                    for c in kids(p):
                        Q[c], N[c], V[c] = v(c) - v(p), 0, 0.0
                u = {c: Q[c] + rule.explore * world.of(c)[1] * math.sqrt(N[p]) / (1 + N[c]) for c in kids(p)}
                p = max(kids(p), key=lambda c, u=u: u[c])
                N[p] += 1
                walk.append(p)
            for p in reversed(walk):
                if p in grown:
                    total = sum(max(1, N[c]) for c in kids(p))
                    V[p] = sum(max(1, N[c]) * Q[c] / total for c in kids(p))
                Q[p] = v(p) - (v(p[:-1]) if p else 0.0) + rule.gamma * V.get(p, 0.0)
        spread = lambda c: max(N[d] for d in kids(c)) - min(N[d] for d in kids(c)) if c in grown else 0
        best = max(kids(here), key=lambda c: (N[c] * (1 + spread(c)), Q[c], V[c]))
        out.append(([Q[c] for c in kids(here)], [N[c] for c in kids(here)], best[-1]))
        here = best
    return out


def test_the_search_is_the_formulas_written_out():
    seed = fresh()
    rule = Puct(iterations=7, first=2, explore=random.uniform(0.3, 2), gamma=random.uniform(0.7, 1))
    world = World(seed)
    (got,) = in_lockstep([search(Node(), rule)], world.expand)
    want = by_hand(world, rule)
    assert len(got) == len(want) == world.depth
    for choice, (Q, N, taken) in zip(got, want, strict=True):
        assert pytest.approx(Q, abs=1e-12) == choice.Q and choice.N == N and choice.taken == taken


def test_visits_add_up_and_v_is_the_mean_over_visits():
    world, rule = World(fresh()), Puct(iterations=9, first=3)
    root = Node()
    (way,) = in_lockstep([search(root, rule)], world.expand)
    committed = [c.node for c in way]
    nodes, before = [root], [0, *(c.N[c.taken] for c in way)]
    for k, choice in enumerate(way):  # each walk that passed a node went on from it: those of its ancestors, and its own
        assert sum(choice.N) == before[k] + rule.iterations * (1 if k else rule.first)
    for node in nodes:
        nodes += node.children or []
        if node.children:
            assert node in committed or sum(c.N for c in node.children) == node.N
            weights = [max(1, c.N) for c in node.children]
            mean = sum(w * c.Q for w, c in zip(weights, node.children, strict=True)) / sum(weights)
            assert node in committed or pytest.approx(mean) == node.V
        elif not node.terminal:
            assert node.N == 0 and node.V == 0
    assert rule.iterations * rule.first == root.N


def test_with_many_walks_the_best_way_is_found():
    """Values only at the end: Q of a child tends to the best of what is below, and the way committed to is the best one."""
    world = World(fresh(), breadth=2)
    leaves = {(a, b, c): world.of((a, b, c))[0] for a in range(2) for b in range(2) for c in range(2)}
    flat = World(world.seed, 2)
    flat.of = lambda path: (4 * leaves[path] if len(path) == 3 else 0.0, 1.0)
    (got,) = in_lockstep([search(Node(), Puct(iterations=400, first=2))], flat.expand)
    assert tuple(c.taken for c in got) == max(leaves, key=leaves.get)


# ---- pairs ----------------------------------------------------------------------------------------------------------------


def spec(**more) -> MCTSSteps:
    small = {"actions": 3, "root_actions": 3, "depth": 3, "iterations": 2, "first": 1, "stage": 4, "step_tokens": 12}
    given = {"prompts": STORY, "rewards": ["rewards.number"], "separator": ";", **small, **more}
    return parts.build({"rollout.mcts_steps": given})


def test_a_pair_is_the_best_against_the_worst_with_what_they_share_taken_off():
    root = Node([])
    a, b, c = (Node([1, 2, k], root) for k in (3, 4, 5))
    root.children = [a, b, c]
    one = Node([7], b)
    b.children = [one]  # no alternative: joined to b
    one.children = [Node([8], one), Node([9], one)]
    choice = Choice(root, [0.5, 1.0, -1.0], [2, 6, 3], 1)
    assert preference(choice, spec(), 0.0) == [[1, 2], [4, 7], [5], 3 / 9]
    assert preference(choice, spec(rejected="second"), 0.0) == [[1, 2], [4, 7], [3], 2 / 8]
    assert {tuple(preference(choice, spec(rejected="random"), u)[2]) for u in (0.1, 0.9)} == {(5,), (3,)}
    assert preference(choice, spec(margin=2.0), 0.0) is None and joined(a) == [1, 2, 3] and said(one) == [1, 2, 4, 7]
    unseen = replace(choice, N=[2, 6, 0])
    assert preference(unseen, spec(), 0.0)[2] == [3]  # what was never visited is not compared
    assert preference(unseen, spec(judge="{answer}?"), 0.0)[2] == [5]
    assert preference(replace(choice, N=[0, 6, 0]), spec(), 0.0) is None
    assert preference(replace(choice, N=[9, 1, 9]), spec(), 0.0)[3] == 0.5  # never more likely wrong than right


def test_dpo_with_a_doubt_for_each_pair():
    base = tiny()
    it = live(base)
    batch, e = pairs(6), 0.5 * torch.rand(6)
    batch.doubt = e
    part = DPO(beta=0.7)
    with torch.no_grad():
        for p in it.params.values():
            p.tensor.mul_(1.01)  # away from the reference
    prepared = part.prepare(batch, player(it, part).views)
    chosen, rejected = (response(base.model, side) for side in (batch.chosen, batch.rejected))
    m = 0.7 * (chosen - prepared.ref_chosen - rejected + prepared.ref_rejected)
    want = (-(1 - e) * torch.log(torch.sigmoid(m)) - e * torch.log(torch.sigmoid(-m))).mean()
    got, out = gradients(it, part, batch, 2)
    assert out.loss == pytest.approx(float(want.detach()), abs=1e-5)
    whole = torch.autograd.grad(want, [p.tensor for p in it.params.values()], allow_unused=True)
    for g, w in zip(got.values(), whole, strict=True):
        assert torch.allclose(g, torch.zeros_like(g) if w is None else w, atol=1e-5)
    batch.doubt = torch.zeros(6)
    plain = Pairs(batch.chosen, batch.rejected)
    sure, known = (gradients(it, part, b, 6)[0] for b in (batch, plain))
    assert all(torch.equal(sure[n], known[n]) for n in known)
    it.close()


# ---- on a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return load("lab/lm@early")


def opened(base, seed, **more):
    ctx = context(base, seed=seed, batch=4)
    ctx.live = live(base, {"adapters.lora": {"rank": 2}})
    return spec(**more).open(ctx)


def grown(stream, prompts):
    forest = Forest(stream.spec, stream.ctx, [stream.prompts[n] for n in prompts], 0)
    return forest, forest.grow()


def test_a_tree_is_a_function_of_its_seed_and_not_of_its_neighbours(base):
    seed = fresh()
    stream = opened(base, seed)
    _, ways = grown(stream, [3, 1])
    _, again = grown(opened(base, seed), [3, 1])
    _, alone = grown(stream, [3])
    shape = lambda way: [(c.N, [round(q, 6) for q in c.Q], c.taken, [k.action for k in c.node.children]) for c in way]
    assert [shape(w) for w in ways] == [shape(w) for w in again] and shape(alone[0]) == shape(ways[0])
    _, other = grown(opened(base, seed + 1), [3, 1])
    assert [shape(w) for w in ways] != [shape(w) for w in other]
    decode = base.tokenizer.decode
    for i, way in enumerate(ways):
        for c in way:
            actions = [tuple(k.action) for k in c.node.children]
            assert len(set(actions)) == len(actions) <= 3
            for k in c.node.children:
                tokens = context_logp(base, stream.prompts[[3, 1][i]].ids + said(c.node), k.action)
                assert k.prior == pytest.approx(math.exp(float(tokens.sum()) / len(k.action) ** 1.25), rel=1e-3)
                text = decode(k.action)
                assert k.terminal or len(k.action) == 12 or text.count(";") == text.rstrip().endswith(";") == 1
                assert k.value in ((-1.0, 1.0) if k.terminal else (0.0,))
        assert way[-1].node.children[way[-1].taken].terminal
    stream.ctx.live.close()


@torch.no_grad()
def context_logp(base, before, action):
    logits = base.model(torch.tensor([before + action])).logits[0].log_softmax(-1)
    return logits[len(before) - 1 : -1].gather(-1, torch.tensor(action)[:, None])[:, 0]


def test_pairs_train_only_where_they_differ(base):
    stream = opened(base, fresh(), stage=8)
    batch = stream.batch(0)
    assert isinstance(batch, Pairs) and 1 <= len(batch) <= 4 and len(batch.doubt) == len(batch)
    assert 0 <= float(batch.doubt.min()) <= float(batch.doubt.max()) <= 0.5
    good, bad = batch.chosen, batch.rejected
    for row in range(len(batch)):
        first, other = (int((side.weights[row] > 0).nonzero()[0]) for side in (good, bad))
        assert first == other and torch.equal(good.ids[row, :first], bad.ids[row, :first])
        assert good.ids[row, first] != bad.ids[row, first]
    told = stream.feedback([], {})
    assert told["tree_pairs"] == len(stream.found) and 0 <= told["tree_right"] <= 1
    assert told["tree_tokens"] > told["tree_nodes"] >= 8
    stream.ctx.live.close()


def test_a_tree_of_depth_1_compares_whole_answers(base):
    stream = opened(base, fresh(), depth=1, stage=8, actions=6, root_actions=6, iterations=64, max_new=40)
    stream.batch(0)
    for n, before, chosen, rejected, _ in stream.found:
        texts = [base.tokenizer.decode(before + x, skip_special_tokens=True) for x in (chosen, rejected)]
        assert stream.spec.rewards[0].score("", texts, stream.prompts[n].meta) == [1.0, 0.0]
    stream.ctx.live.close()


def test_the_policy_as_its_own_judge():
    base = load("lab/lm-instruct")
    seed, judge = fresh(), "Question: {prompt} Answer: {answer}. Is this right? Answer yes or no."
    ask = {"prompts": {"data.lab": {"skills": ["chat-steps"], "rows": 10}}, "judge": judge, "iterations": 1, "first": 1}
    stream = opened(base, seed, **ask)
    p = stream.prompts[0]
    forest = Forest(stream.spec, stream.ctx, [p], 0)
    node = Node()
    forest.expand({0: node})
    for child in node.children:
        text = base.tokenizer.decode(child.action, skip_special_tokens=True)
        question = p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"]
        form = judge.format(prompt=question, answer=text)
        ids = encode(Prompt(form if isinstance(p.prompt, str) else [{"role": "user", "content": form}]), base.tokenizer).ids
        with torch.no_grad():
            z = base.model(torch.tensor([ids])).logits[0, -1]
        yes, no = (z[base.tokenizer(w, add_special_tokens=False)["input_ids"][0]] for w in ("yes", "no"))
        sure = float(torch.sigmoid(yes - no))
        outcome = 2 * stream.spec.rewards[0].score(p.prompt, [text], p.meta)[0] - 1 if child.terminal else 0
        assert 0 < sure < 1 and child.value - outcome == pytest.approx(sure, abs=1e-4)
        assert child.Q == child.reward == child.value
    stream.ctx.live.close()
    with pytest.raises(UserError, match="same token"):
        Forest(replace(stream.spec, no="yes"), stream.ctx, [p], 0)._judge([0], ["x"])


def test_what_cannot_be_searched_is_refused():
    one = {"actions": 1, "root_actions": 1}
    cold, whole, heavy = {"temperature": 0.0}, {"separator": ""}, {"weights": [1, 2]}
    for bad, words in ((one, "two actions"), (cold, "temperature"), (whole, "separator"), (heavy, "weights")):
        with pytest.raises(UserError, match=words):
            spec(**bad)


def test_killed_inside_a_stage_it_goes_on_with_the_same_pairs(tmp_path):
    tree = {"actions": 2, "root_actions": 4, "depth": 3, "iterations": 1, "first": 2, "greedy": False, "step_tokens": 12}
    source = {"prompts": STORY, "rewards": ["rewards.number"], "separator": ";", "stage": 6, "epochs": 2, **tree}
    train = {
        "source": {"rollout.mcts_steps": source}, "objective": "objectives.preference.dpo", "steps": 3, "batch": 3,
        "optimizer": {"optim.adamw": {"lr": 1e-4}}, "save": {"steps": 1},
    }  # fmt: skip
    whole, resumed = killed_and_resumed(recipe({"name": "mcts", "train": train}, base="lab/lm@early"), tmp_path, kills=[2])
    assert same_to_the_bit(whole, resumed)
    assert whole.json["steps"][0]["steps"] == 3
