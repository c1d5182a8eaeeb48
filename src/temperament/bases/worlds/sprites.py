"""The sprite world: small pictures of coloured, textured shapes on a background, every factor known exactly.

    scene = scenes("test", 1)[0]
    scene.caption()                       "a red striped cross at the top left on navy"
    image = render(scene)                 (3, 16, 16) float32 in [0, 1]
    masks(scene), boxes(scene)            (subjects, 16, 16) bool, (subjects, 4) int: x0, y0, x1, y1 (ends excluded)
    edit(scene, Draw("e", 0))             an instruction and the scene it asks for
    corrupt(image, "blur", 3, Draw("c", 0)), shift_colours(image)

A subject has a shape, a colour, a texture and one of four places; a scene has one or two and a background. Factors are
independent, so each can be asked for alone. One in ten combinations of shape, colour and background is held out of training
for ever. Beside the six shapes there are *sprites*: mirror-symmetric figures by number, of two colours; those of the test
split appear in no training picture, whatever draws it - a subject to be taught, an identity to be kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy import ndarray

from .draw import Draw, split_of

SIZE, CELL = 16, 8  # of a picture; of one of its four places
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.2, 0.35, 1.0), "yellow": (0.95, 0.9, 0.1),
           "magenta": (0.9, 0.2, 0.9), "white": (1.0, 1.0, 1.0)}  # fmt: skip
BACKGROUNDS = {"black": (0.0, 0.0, 0.0), "grey": (0.45, 0.45, 0.45), "navy": (0.05, 0.05, 0.35), "brown": (0.35, 0.2, 0.05)}
TEXTURES = ("plain", "striped", "dotted")
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}  # row, column of the cell
SHAPES = {
    "disc": "..###.. .#####. ####### ####### ####### .#####. ..###..",
    "frame": "####### ####### ##...## ##...## ##...## ####### #######",
    "cross": "..###.. ..###.. ####### ####### ####### ..###.. ..###..",
    "triangle": "...#... ...#... ..###.. ..###.. .#####. .#####. #######",
    "saltire": "##...## ###.### .#####. ..###.. .#####. ###.### ##...##",
    "bar": "....... ....... ####### ####### ####### ....... .......",
}
CORRUPTIONS = ("noise", "blur", "contrast", "pixelate", "fog")


@dataclass(frozen=True)
class Subject:
    """shape: one of SHAPES, or "sprite 17". shift: of the figure inside its cell, 0 or 1 in rows and columns."""

    shape: str
    colour: str
    texture: str
    place: str
    shift: tuple[int, int] = (0, 0)

    def words(self, name: str | None = None) -> str:
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"a {name or f'{self.colour} {texture}{self.shape}'} at the {self.place}"


@dataclass(frozen=True)
class Scene:
    subjects: tuple[Subject, ...]
    background: str

    def caption(self, names: dict[str, str] | None = None) -> str:
        """names: what to call a shape instead of its colour, texture and shape, as a subject that is taught is called."""
        said = (s.words((names or {}).get(s.shape)) for s in self.subjects)
        return f"{' and '.join(said)} on {self.background}"

    @property
    def split(self) -> str:
        """Test if any of its subjects is."""
        own = (split_of("sprites", s.shape, *(() if s.shape.startswith("sprite ") else (s.colour, self.background)))
               for s in self.subjects)  # fmt: skip
        return "test" if "test" in own else "train"


def scenes(
    split: str, n: int, seed: int = 0, subjects: Sequence[int] = (1,), shapes: Sequence[str] = tuple(SHAPES)
) -> list[Scene]:
    """n scenes of a split, in a fixed order; `subjects`: how many each may hold. Of two subjects no factor but the texture is
    shared."""
    draw, found = Draw("scenes", split, seed, *subjects), []
    while len(found) < n:
        k = draw.choice(subjects)
        pick = lambda options, k=k: draw.sample(tuple(options), k)
        factors = zip(pick(shapes), pick(COLOURS), [draw.choice(TEXTURES) for _ in range(k)], pick(PLACES), strict=True)
        made = tuple(Subject(*f, shift=(draw.below(2), draw.below(2))) for f in factors)
        scene = Scene(made, draw.choice(tuple(BACKGROUNDS)))
        if scene.split == split:
            found.append(scene)
    return found


def sprites(split: str, n: int) -> list[str]:
    """The first n sprites of a split, by name."""
    found, i = [], 0
    while len(found) < n:
        if split_of("sprites", f"sprite {i}") == split:
            found.append(f"sprite {i}")
        i += 1
    return found


@cache
def _figure(shape: str) -> ndarray:
    """(7, 7) int: 0 outside, 1 body, 2 the second colour of a sprite."""
    if shape in SHAPES:
        return np.array([[c == "#" for c in row] for row in SHAPES[shape].split()], dtype=int)
    draw = Draw("sprites", "figure", shape)
    half = np.array([[draw.chance(0.65) * (1 + draw.chance(0.4)) for _ in range(4)] for _ in range(7)])
    half[3, 3] = 1  # never empty
    return np.concatenate([half, half[:, 2::-1]], axis=1)


def _second(shape: str, colour: str) -> ndarray:
    return np.array(COLOURS[Draw("sprites", "second", shape).choice([c for c in COLOURS if c != colour])])


def _paint(subject: Subject) -> tuple[ndarray, ndarray]:
    """The mask (16, 16) of a subject, and its colours (16, 16, 3)."""
    figure, (row, column), (down, right) = _figure(subject.shape), PLACES[subject.place], subject.shift
    top, left = CELL * row + down, CELL * column + right
    mask, colours = np.zeros((SIZE, SIZE), dtype=bool), np.zeros((SIZE, SIZE, 3))
    body = np.broadcast_to(np.array(COLOURS[subject.colour]), (7, 7, 3)).copy()
    body[figure == 2] = _second(subject.shape, subject.colour)
    rows, columns = np.indices((7, 7))
    dark = {"plain": rows < 0, "striped": rows % 2 == 1, "dotted": (rows + columns) % 2 == 1}[subject.texture]
    body[dark] *= 0.45
    mask[top : top + 7, left : left + 7] = figure > 0
    colours[top : top + 7, left : left + 7] = body
    return mask, colours


def render(scene: Scene) -> ndarray:
    """(3, 16, 16) float32 in [0, 1]."""
    picture = np.broadcast_to(np.array(BACKGROUNDS[scene.background]), (SIZE, SIZE, 3)).copy()
    for subject in scene.subjects:
        mask, colours = _paint(subject)
        picture[mask] = colours[mask]
    return picture.transpose(2, 0, 1).astype(np.float32)


def masks(scene: Scene) -> ndarray:
    """(subjects, 16, 16) bool."""
    return np.stack([_paint(s)[0] for s in scene.subjects])


def boxes(scene: Scene) -> ndarray:
    """(subjects, 4): x0, y0, x1, y1 in pixels, ends excluded."""
    found = []
    for mask in masks(scene):
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        found.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return np.array(found)


def edit(scene: Scene, draw: Draw) -> tuple[str, Scene]:
    """One change of one factor of the first subject or of the background, in words and done."""
    first = scene.subjects[0]
    taken = {s.place for s in scene.subjects}
    kind = draw.choice(("colour", "texture", "place", "background"))
    other = lambda options, own: draw.choice([o for o in options if o != own])
    if kind == "background":
        new = other(BACKGROUNDS, scene.background)
        return f"put it on {new}", replace(scene, background=new)
    if kind == "place":
        new = draw.choice([p for p in PLACES if p not in taken])
        words = f"move the {first.shape} to the {new}"
    elif kind == "colour":
        new = other(COLOURS, first.colour)
        words = f"make the {first.shape} {new}"
    else:
        new = other(TEXTURES, first.texture)
        words = f"make the {first.shape} {new}"
    return words, replace(scene, subjects=(replace(first, **{kind: new}), *scene.subjects[1:]))


def corrupt(image: ndarray, kind: str, severity: int, draw: Draw) -> ndarray:
    """A corrupted copy, severity 1 to 5; noise is addressed by `draw`."""
    k, H = severity / 5, image.shape[-1]
    if kind == "noise":
        seed = draw.below(2**31)
        image = image + 0.5 * k * np.random.default_rng(seed).standard_normal(image.shape)
    elif kind == "blur":
        for _ in range(severity):
            wide = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
            image = sum(wide[:, i : i + H, j : j + H] for i in range(3) for j in range(3)) / 9 * 0.5 + image * 0.5
    elif kind == "contrast":
        image = (image - image.mean()) * (1 - 0.85 * k) + image.mean()
    elif kind == "pixelate":
        step = 2 if severity < 4 else 4
        small = image.reshape(3, H // step, step, H // step, step).mean((2, 4))
        image = small.repeat(step, 1).repeat(step, 2) * (0.4 + 0.6 * k) + image * (0.6 - 0.6 * k)
    elif kind == "fog":
        image = image * (1 - 0.75 * k) + 0.75 * k
    else:
        raise ValueError(f"no such corruption: {kind}; there are {', '.join(CORRUPTIONS)}")
    return np.clip(image, 0, 1).astype(np.float32)


def shift_colours(image: ndarray) -> ndarray:
    """Another domain: colour channels in another order, darker."""
    return (image[[2, 0, 1]] * 0.8).astype(np.float32)


@cache
def _all(shapes: tuple[str, ...]) -> tuple[list[Scene], ndarray, ndarray]:
    """Every scene of one subject of these shapes, its picture (scenes, 3 * 16 * 16) and half its square."""
    found = [
        Scene((Subject(shape, colour, texture, place, (down, right)),), background)
        for shape in shapes
        for colour in COLOURS
        for texture in TEXTURES
        for place in PLACES
        for background in BACKGROUNDS
        for down in (0, 1)
        for right in (0, 1)
    ]
    pictures = np.stack([render(s).ravel() for s in found])
    return found, pictures, 0.5 * np.square(pictures).sum(1)


def recognise(images: ndarray, sprites: Sequence[str] = ()) -> list[tuple[Scene, float]]:
    """What pictures (rows, 3, 16, 16) show, by the world's own eye: of all scenes of one subject the nearest, and the root
    mean square between the two. sprites: which it knows beside the shapes."""
    found, pictures, half = _all((*SHAPES, *sprites))
    flat = np.asarray(images, dtype=np.float32).reshape(len(images), -1)
    nearest = (half[None] - flat @ pictures.T).argmin(1)
    return [(found[i], float(np.sqrt(np.square(row - pictures[i]).mean()))) for i, row in zip(nearest, flat, strict=True)]


def factors(scene: Scene) -> dict[str, str]:
    """What can be said of the first subject, and of the background."""
    first = scene.subjects[0]
    return {"shape": first.shape, "colour": first.colour, "texture": first.texture, "place": first.place,
            "background": scene.background}  # fmt: skip


def vocabulary() -> list[str]:
    """Every word of captions and edits, in a fixed order."""
    words = ["a", "and", "at", "the", "on", "put", "it", "move", "to", "make", "left", "right", "top", "bottom", "sprite"]
    return [*words, *COLOURS, *TEXTURES, *SHAPES, *BACKGROUNDS]


FACTORS = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "texture": TEXTURES, "place": tuple(PLACES),
           "background": tuple(BACKGROUNDS)}  # fmt: skip


def value(scene: Scene, factor: str) -> str:
    """Of a factor, in the first subject or the background."""
    return scene.background if factor == "background" else getattr(scene.subjects[0], factor)


def alternatives(scene: Scene, factor: str) -> tuple[list[str], int]:
    """Captions of this scene with each value of one factor, in the order of FACTORS, and which of them is true."""
    first, rest = scene.subjects[0], scene.subjects[1:]
    put = lambda v: replace(scene, **{factor: v}) if factor == "background" else replace(
        scene, subjects=(replace(first, **{factor: v}), *rest))  # fmt: skip
    return [put(v).caption() for v in FACTORS[factor]], FACTORS[factor].index(value(scene, factor))
