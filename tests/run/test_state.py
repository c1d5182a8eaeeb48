"""The change of a further step on the change before it."""

import torch
from tiny import rng, tiny

from temperament.delta import Delta, LowRank, Replace, Sparse
from temperament.run.state import State, chain, place_on


def test_a_step_after_a_merge_of_any_strength_leaves_what_both_did():
    """base + chain(before, step) = (base + before) + step, for every kind of change, also where the step does nothing."""
    base, r = tiny(), rng()
    names = [n for n, p in base.parameters() if p.dim() == 2 and "proj" in n][:5]
    draw = lambda *shape: 0.1 * torch.randn(*shape, generator=r)
    low = lambda p: LowRank(draw(2, p.shape[1]), draw(p.shape[0], 2), scale=1.5)
    known = dict(base.parameters())
    before = Delta({n: low(known[n]) for n in names[:4]}) * 0.5
    place_on(base, State("", before))
    at = {n: known[n].detach().clone() for n in names}
    touched = at[names[3]].clone()
    touched[0] += 1
    step = Delta(
        {names[0]: low(at[names[0]]), names[1]: Replace(at[names[1]] + 1), names[3]: Sparse.changed(at[names[3]], touched)}
        | {names[4]: low(at[names[4]])}
    )
    want = at | {n: c.apply(at[n]) for n, c in step.changes.items()}
    whole = chain(base, before, step)
    place_on(base, State("", whole))
    for n in names:
        torch.testing.assert_close(known[n].detach(), want[n], rtol=1e-6, atol=1e-6)
    assert isinstance(whole.changes[names[0]], LowRank) or whole.changes[names[0]].kind == "sum"
