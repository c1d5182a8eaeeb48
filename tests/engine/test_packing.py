"""Packing keeps every document whole and apart; a stream is a pure function of seed and step; a mixture keeps its shares."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temperament.engine.encoded import Encoded, EncodedPair, collate
from temperament.engine.packing import best_fit, fill, pack
from temperament.engine.stream import Stream, mix
from temperament.errors import UserError

lengths = st.lists(st.integers(1, 32), min_size=1, max_size=60)


def docs(sizes, start=10):
    ids = iter(range(start, 10**6))
    return [Encoded([next(ids) for _ in range(n)], [0.0] + [1.0] * (n - 1)) for n in sizes]


def documents(batch):
    """(ids, weights) of every document of a batch, read back from its tensors."""
    found = []
    for ids, weights, segments in zip(batch.ids, batch.weights, batch.segments, strict=True):
        for s in range(int(segments.max()) + 1):
            here = segments == s
            assert here.any() and (here.nonzero().diff(dim=0) == 1).all()
            found.append((ids[here].tolist(), weights[here].tolist()))
    return sorted(found)


@given(lengths, st.integers(32, 80))
def test_all_items_once_and_no_row_too_full(sizes, room):
    rows = best_fit(sizes, room)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= room for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // room) * 1.5 + 1  # far from one row each
    assert sorted(map(len, best_fit(sizes[::-1], room))) is not None and len(best_fit(sizes[::-1], room)) == len(rows)


def brute_best_fit(sizes, room):
    rows, left = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [r for r in range(len(rows)) if left[r] >= sizes[i]]
        r = min(fitting, key=lambda r: left[r], default=None)
        if r is None:
            rows.append([])
            left.append(room)
            r = len(rows) - 1
        rows[r].append(i)
        left[r] -= sizes[i]
    return sorted(left)


@given(lengths)
def test_equals_the_slow_way(sizes):
    assert sorted(40 - sum(sizes[i] for i in row) for row in best_fit(sizes, 40)) == brute_best_fit(sizes, 40)


@given(lengths)
def test_packing_is_padding_rearranged(sizes):
    """The union of documents, their weights and positions are those of the padded batch."""
    whole = docs(sizes)
    packed, padded = collate(pack(whole, 40)), collate(whole)
    assert documents(packed) == documents(padded)
    assert packed.trained == padded.trained
    new = packed.positions == 0
    assert (packed.weights[new] == 0).all()  # the first token of a document is predicted by nothing
    assert (packed.ids.shape[1] <= 40) and not (packed.weights[~packed.mask] != 0).any()


def test_long_documents():
    with pytest.raises(UserError, match="50 tokens long"):
        pack(docs([50]), 40)
    pieces = pack(docs([50, 5]), 20, split=True)
    assert sorted(i for row in pieces for d in row for i in d.ids) == list(range(10, 65))
    assert all(d.weights[0] == 0 for row in pieces for d in row)
    assert fill(pieces, 20).tokens == 55 and fill(pieces, 20).rate == 55 / (len(pieces) * 20)


def test_many_short_documents_fill_rows():
    sizes = torch.randint(3, 90, (3000,), generator=torch.Generator().manual_seed(1)).tolist()
    assert fill(pack(docs(sizes), 512), 512).rate > 0.99


# ---- streams ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 5), st.sampled_from([0, 40]), st.booleans(), st.booleans())
def test_each_epoch_holds_everything_once(n, batch, seed, room, by_rows, merge):
    count, last = "rows" if by_rows else "examples", "merge" if merge else "keep"
    sizes = [(7 * i) % 30 + 1 for i in range(n)]
    make = lambda: Stream(docs(sizes), batch, seed, pack=room, count=count, last=last)
    stream = make()
    for epoch in (0, 3):
        steps = range(epoch * len(stream), (epoch + 1) * len(stream))
        found = sorted(d for k in steps for d in documents(stream[k]))
        assert found == documents(collate(docs(sizes)))
        late = make()  # a new process that starts in the middle sees the same
        k = steps[-1]
        assert torch.equal(late[k].ids, stream[k].ids) and torch.equal(late[k].examples, stream[k].examples)


def test_packed_steps_hold_the_examples_of_padded_steps():
    whole = docs([(5 * i) % 17 + 2 for i in range(40)])
    a, b = Stream(whole, 8, 1), Stream(whole, 8, 1, pack=40)
    assert len(a) == len(b) and b.fill().rate > 0.5 and a.fill() is None
    for k in range(12):
        assert documents(a[k]) == documents(b[k]) and len(b[k]) < len(a[k])


def test_order():
    whole = docs([3] * 50)
    order = lambda stream, epoch: [int(i) for k in range(len(stream)) for i in stream[epoch * len(stream) + k].examples[:, 0]]
    a = Stream(whole, 7, seed=1)
    assert order(a, 0) != order(a, 1) != order(Stream(whole, 7, seed=2), 1)
    assert order(Stream(whole, 7, shuffle=False), 2) == list(range(50))
    assert [len(a[k]) for k in range(8)] == [7] * 7 + [1]
    merged = Stream(whole, 7, last="merge")
    assert [len(merged[k]) for k in range(7)] == [7] * 6 + [8] and len(merged) == 7
    assert a.steps(2) == 16 and a.steps(0.5) == 4


def test_provenance_and_pairs():
    one = docs([4])[0]
    stream = Stream([EncodedPair(one, docs([5])[0])] * 3, 2, name="prefs")
    assert stream[0].chosen.extra[0]["source"] == "prefs" and len(stream[1]) == 1
    with pytest.raises(UserError, match="not packed"):
        Stream([EncodedPair(one, one)], 2, pack=9)
    with pytest.raises(UserError, match="nothing to train on"):
        Stream([], 2)
    with pytest.raises(UserError, match="tokens long"):
        Stream(docs([50]), 2, pack=9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=5), st.integers(1, 20))
def test_shares_are_exact_over_time(weights, batch):
    m = mix([(Stream(docs([2] * (3 + i)), batch, name=f"s{i}"), w) for i, w in enumerate(weights)], batch)
    given_ = [0] * len(weights)
    for k in range(30):
        counts = m.counts(k)
        assert sum(counts) == batch and min(counts) >= 0
        given_ = [a + b for a, b in zip(given_, counts, strict=True)]
        for g, s in zip(given_, m.shares, strict=True):
            assert abs(g - s.weight * batch * (k + 1)) < 2
    late = mix([(s.stream, float(s.weight)) for s in m.shares], batch)
    assert sum(late.counts(29)) == batch


def test_a_mixture():
    a, b = Stream(docs([3] * 9), 8, 3, name="new"), Stream(docs([5] * 40, 1000), 8, 3, name="old")
    m = mix([(a, 3), (b, 1)], 8)
    assert [s.weight for s in m.shares] == [Fraction(3, 4), Fraction(1, 4)]
    assert all(m.counts(k) == [6, 2] for k in range(20))
    assert m.steps_per_epoch == 20  # forty old rows, two a step
    numbers = [int(i) for k in range(20) for i in m[k].examples[:, 0] if i >= 9]
    assert sorted(numbers) == list(range(9, 49))  # each old row once, with numbers of its own
    assert {e["source"] for e in m[0].extra} == {"new", "old"}
    new = [int(i) for k in range(3) for i in m[k].examples[:, 0] if i < 9]
    assert sorted(new) == sorted([*range(9)] * 2)  # eighteen draws: each new row twice
    with pytest.raises(UserError, match="one name"):
        mix([(a, 1), (a, 1)], 8)
    with pytest.raises(UserError, match="above 0"):
        mix([(a, 1), (b, 0)], 8)
