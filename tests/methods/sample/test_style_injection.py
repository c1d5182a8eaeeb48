"""Style injection: replayed on itself it changes nothing; statistics and attention by their formulas."""

import pytest
import torch
from methods.sample.toy import small

from temperament.engine.denoise import Hook, Sampler, denoise, invert
from temperament.engine.measure import System
from temperament.engine.pictures import Picture, png_bytes
from temperament.errors import UserError
from temperament.methods.sample.style_injection import Kept, StyleInjection, _Inject, adain, chosen
from temperament.nn.attention import Attend, Edit
from temperament.nn.context import intervening
from temperament.parts import build
from temperament.protocols import Decode

CAPTIONS = ["a red cross at the top left on navy", "a blue disc on black"]
PLAIN = Sampler(3, 0.0, 1.0)


def picture(path, seed):
    path.write_bytes(png_bytes(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed))))
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "styles").mkdir()
    for i in (1, 2):
        picture(tmp_path / "styles" / f"{i}.png", i)
    return picture(tmp_path / "style.png", 1), picture(tmp_path / "content.png", 7), str(tmp_path / "styles")


@pytest.mark.parametrize("kind", ["unet", "flow"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_what_was_kept_in_a_pass_replays_that_pass_to_the_bit(kind, gamma):
    base = small(kind, 3)
    kept = Kept(chosen(base, []))

    class Record(Hook):
        def begin(self, state):
            self.state = state

        def around(self, predict):
            def kept_of(*args, **more):
                kept.at(self.state.step)
                with kept.recording():
                    return predict(*args, **more)

            return kept_of

    plain = denoise(base, [""] * 2, PLAIN, seed=5)
    assert torch.equal(denoise(base, [""] * 2, PLAIN, seed=5, hooks=[Record()]).latents, plain.latents)
    replay = _Inject(StyleInjection("unread", gamma=gamma, temperature=1.0), kept.sites, {}, kept, kept, torch.arange(2))
    replay.begin = lambda state: setattr(replay, "state", state)
    assert torch.equal(denoise(base, [""] * 2, PLAIN, seed=5, hooks=[replay]).latents, plain.latents)


def test_the_start_has_the_styles_statistics():
    content, style = 3 * torch.randn(4, 3, 8, 8) + 1, 0.5 * torch.randn(4, 3, 8, 8) - 2
    made = adain(content, style)
    torch.testing.assert_close(made.mean((2, 3)), style.mean((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.std((2, 3)), style.std((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adain(content, content), content, rtol=1e-4, atol=1e-4)


def test_the_attention_is_that_of_the_formula(pictures):
    """What leaves an open attention, against softmax(T q' k_s^T / sqrt(d)) v_s written out."""
    base, (style, content, _) = small("unet", 2), pictures
    part = StyleInjection(style, content, gamma=0.6, temperature=1.7)
    hook, seen = part.hooks(base)[0], {}
    assert [s.name.split(".")[0] for s in hook.sites] == ["denoiser/up_blocks"] * 2 and not any(s.cross for s in hook.sites)

    class Look(Hook):
        def begin(self, state):
            self.state = state

        def around(self, predict):
            keep_q = lambda q, k, v, at: (seen.__setitem__(("q", self.state.step, at.site.name), q), (q, k, v))[1]
            keep_out = lambda out, at: (seen.__setitem__(("out", self.state.step, at.site.name), out), out)[1]

            def looked(*args, **more):
                with intervening(Attend(hook.sites, Edit(heads=keep_out))):
                    return predict(*args, **more)

            def before(*args, **more):  # the outermost edit is asked first: the network's own queries
                with intervening(Attend(hook.sites, Edit(qkv=keep_q))):
                    return looked(*args, **more)

            return before

    denoise(base, CAPTIONS, PLAIN, seed=1, hooks=[hook, Look()])
    for step in range(3):
        for site in hook.sites:
            q = 0.6 * hook.content.found[step, site.name][0] + 0.4 * seen["q", step, site.name]
            k, v = (t.expand_as(q) for t in hook.style.found[step, site.name][1:])
            want = torch.softmax(1.7 * q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
            torch.testing.assert_close(seen["out", step, site.name], want.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_a_picture_in_its_own_style_is_itself(pictures):
    """Content as its own style, walked back exactly: the same picture again, whatever gamma."""
    base, (_, content, _) = small("unet", 2), pictures
    base.processors["scheduler"] = {**base.processors["scheduler"], "prediction_type": "v_prediction"}
    part = StyleInjection(content, content, gamma=0.4, temperature=1.0, refine=15)
    made = denoise(base, [""], Sampler(3, 0.0, 1.0), hooks=part.hooks(base))
    torch.testing.assert_close(made.pixels[0], Picture(content).pixels((16, 16)), rtol=0, atol=0.02)


def test_each_row_takes_its_own_style_and_painted_content_is_the_samplers(pictures):
    base, styles = small("unet", 4), pictures[2]
    part = build({"sample.style_injection": {"style": styles}}, Decode)
    how = build({"sample.sampler": {"steps": 3, "guidance": 2.0, "eta": 1.0}})
    together = System(base, [how, part], seed=2).paint(CAPTIONS)
    for i in (0, 1):
        one = StyleInjection(f"{styles}/{i + 1}.png")
        alone = System(base, [how, one], seed=2).paint(CAPTIONS[i : i + 1], torch.tensor([i]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)
    painted = denoise(base, CAPTIONS, how.sampler, seed=2)
    start = invert(base, painted.latents, steps=3)
    hook = StyleInjection(f"{styles}/1.png", adain=False).hooks(base)[0]
    denoise(base, CAPTIONS, how.sampler, seed=2, hooks=[hook, keeper := _Start()])
    torch.testing.assert_close(keeper.x, start, rtol=1e-3, atol=1e-3)


class _Start(Hook):
    def begin(self, state):
        self.x = state.x.clone()


def test_what_cannot_be_read_is_refused(tmp_path):
    for bad in ({"style": str(tmp_path)}, {"style": str(tmp_path / "none.png")}):
        with pytest.raises(UserError, match="no picture is there"):
            build({"sample.style_injection": bad}).hooks(small("unet", 1))
    with pytest.raises(UserError):
        build({"sample.style_injection": {"style": "x", "gamma": 2.0}})
