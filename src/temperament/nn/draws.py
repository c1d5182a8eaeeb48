"""Random draws with an address: what was drawn depends on where it is used, never on when or beside what.

    word(seed, purpose, step, example, position) = mix(mix(key + C * example) + C * position)        64 bits
    key = mix(mix(mix(seed) + digest(purpose)) + step),      mix = the splitmix64 finaliser (Stafford's 13th variant)

A counter-based generator: no state, so nothing to save when a run is killed, and a row draws the same bits in a batch of one
or of a thousand, on any process, in any order, on CPU and GPU (integers and uniforms to the bit; normals are computed in
fp64 and rounded, so to the bit but for a rare last place). `purpose` is a word such as "sample", "noise", "dropout": two uses
that should not share their draws take two words. `example` is the id of a training item (-1 where there is none).

`positions` says what is drawn for each example:
    int            one draw per example at that position                        -> examples.shape
    tensor         one draw per pair, broadcast against examples                -> broadcast shape
    tuple          a block of that shape, positions 0.. in row-major order      -> examples.shape + shape
Source of the mixing function: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

Positions = int | Tensor | tuple[int, ...]


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix_int(z: int) -> int:
    z &= _WORD
    z = ((z ^ (z >> 30)) * _M1) & _WORD
    z = ((z ^ (z >> 27)) * _M2) & _WORD
    return z ^ (z >> 31)


def _shift_xor(z: Tensor, n: int) -> Tensor:
    # `>>` on int64 drags the sign along; the mask makes it the logical shift of a 64-bit word
    return z ^ ((z >> n) & ((1 << (64 - n)) - 1))


def _mix(z: Tensor) -> Tensor:
    """The same finaliser on int64 tensors; products wrap, as two's complement does everywhere torch runs."""
    z = _shift_xor(z, 30) * _signed(_M1)
    z = _shift_xor(z, 27) * _signed(_M2)
    return _shift_xor(z, 31)


@lru_cache(maxsize=4096)
def _digest(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def key(seed: int, purpose: str, *ints: int) -> int:
    """64 bits from a seed, a purpose and any further integers, in order."""
    k = _mix_int(_mix_int(seed + _GOLDEN) + _digest(purpose))
    for i in ints:
        k = _mix_int(k + _GOLDEN * (i + 1))
    return k


def words(seed: int, purpose: str, step: int, examples: Tensor, positions: Positions = 0) -> Tensor:
    """int64 words, every bit of them random: what all other draws are made of."""
    h = _mix(_signed(key(seed, purpose, step)) + _signed(_GOLDEN) * (examples.long() + 1))
    if isinstance(positions, tuple):
        size = math.prod(positions)
        at = torch.arange(size, device=h.device).view(positions)
        h = h.view(*h.shape, *(1 for _ in positions))
    elif isinstance(positions, Tensor):
        at = positions.to(h.device, torch.long)
    else:
        return _mix(h + _signed((_GOLDEN * (positions + 1)) & _WORD))
    return _mix(h + _signed(_GOLDEN) * (at + 1))


def uniform(seed: int, purpose: str, step: int, examples: Tensor, positions: Positions = 0) -> Tensor:
    """float32 in [0, 1): the top 24 bits, so every value is exact and 1 never comes."""
    return _unit(words(seed, purpose, step, examples, positions))


def normal(seed: int, purpose: str, step: int, examples: Tensor, positions: Positions = 0) -> Tensor:
    """float32 standard normal: Box-Muller on the two halves of a word, in fp64."""
    w = words(seed, purpose, step, examples, positions)
    radius = (((w >> 32) & 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    angle = (w & 0xFFFFFFFF).double() * (2.0**-32 * 2 * math.pi)
    return ((-2 * radius.log()).sqrt() * angle.cos()).float()


def beta(a: Tensor, b: Tensor, seed: int, purpose: str, step: int, examples: Tensor) -> Tensor:
    """float32 in (0, 1), of the shape of a and b (*examples.shape, ...): a draw of Beta(a, b) in each place, by its position.

    x / (x + y) of two Gammas, each drawn without a loop that ends by chance, so that every draw has one address. Computed in
    fp64 and rounded, like a normal: to the bit but for a rare last place."""
    inner = tuple(a.shape[examples.dim() :])
    x, y = (_log_gamma_draw(t.double(), seed, f"{purpose}/{n}", step, examples, inner) for t, n in ((a, "x"), (b, "y")))
    return torch.sigmoid(x - y).clamp(1e-7, 1 - 1e-7).float()


def _log_gamma_draw(k: Tensor, seed: int, purpose: str, step: int, examples: Tensor, inner: tuple[int, ...]) -> Tensor:
    """log of a draw of Gamma(k): the first of TRIES proposals of Marsaglia and Tsang (2000) that is accepted, each of which is
    with probability above 0.95; of k + 1, brought to k by a uniform, as small k want."""
    k = k.clamp(min=1e-6)
    d = k + 1 - 1 / 3
    c, found, done = 1 / (9 * d).sqrt(), d.log(), torch.zeros_like(k, dtype=torch.bool)
    for i in range(TRIES):
        z = normal(seed, f"{purpose}/{i}/z", step, examples, inner or 0).to(k)
        u = uniform(seed, f"{purpose}/{i}/u", step, examples, inner or 0).to(k) + 2.0**-25
        v = (1 + c * z) ** 3
        good = (v > 0) & (u.log() < z * z / 2 + d - d * v + d * v.clamp(min=1e-300).log()) & ~done
        found, done = torch.where(good, d.log() + v.clamp(min=1e-300).log(), found), done | good
    last = uniform(seed, f"{purpose}/u", step, examples, inner or 0).to(k) + 2.0**-25
    return found + last.log() / k


TRIES = 8


def randint(high: int, seed: int, purpose: str, step: int, examples: Tensor, positions: Positions = 0) -> Tensor:
    """int64 in [0, high). The bias of the remainder is below high / 2^63."""
    return ((words(seed, purpose, step, examples, positions) >> 1) & ((1 << 63) - 1)) % high


def permutation(n: int, seed: int, purpose: str, epoch: int = 0) -> Tensor:
    """A random order of range(n): the order in which its words sort."""
    return words(seed, purpose, epoch, torch.arange(n)).argsort(stable=True)


def generator(seed: int, purpose: str, *ints: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch.Generator with an addressed seed, for code that accepts nothing else. Its stream is ordered: use it once."""
    return torch.Generator(device).manual_seed(key(seed, purpose, *ints))


@dataclass(frozen=True)
class Address:
    """Where a module draws: all but the position inside its own output. examples and positions share the leading shape of that
    output ((rows,) or (rows, T)); with positions from `Tokens`, a packed token draws what it would draw alone.
    """

    seed: int
    purpose: str
    step: int
    examples: Tensor
    positions: Tensor | None = None

    def at(self, purpose: str) -> Address:
        """The same place, another use: `address.at("dropout/" + place)`."""
        return replace(self, purpose=f"{self.purpose}/{purpose}")

    def words(self, shape: tuple[int, ...] = ()) -> Tensor:
        """(*examples.shape, *shape) int64."""
        if self.positions is None:
            return words(self.seed, self.purpose, self.step, self.examples, shape or 0)
        w = words(self.seed, self.purpose, self.step, self.examples, self.positions)
        if not shape:
            return w
        inner = torch.arange(1, math.prod(shape) + 1, device=w.device).view(shape)
        return _mix(w.view(*w.shape, *(1 for _ in shape)) + _signed(_GOLDEN) * inner)

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        return _unit(self.words(shape))


def _unit(w: Tensor) -> Tensor:
    return ((w >> 40) & 0xFFFFFF).float() * 2.0**-24


def dropout(x: Tensor, p: float, address: Address | None) -> Tensor:
    """x with each entry zero with probability p, the rest divided by 1 - p. No address (evaluation) or p = 0: x itself.

    x (*address.examples.shape, ...).
    """
    if address is None or p == 0:
        return x
    lead = address.examples.shape
    assert x.shape[: len(lead)] == lead, f"x {tuple(x.shape)} does not begin with the address's shape {tuple(lead)}"
    keep = address.uniform(tuple(x.shape[len(lead) :])) >= p
    return x * keep / (1 - p) if p < 1 else torch.zeros_like(x)
