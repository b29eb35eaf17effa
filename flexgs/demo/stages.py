"""Solids of the two built-in scenes: positions and sizes in metres, z up."""

from itertools import pairwise

import numpy as np

from flexgs.demo.tracer import (
    Array,
    Solid,
    Stage,
    Texture,
    bricks,
    checker,
    noise,
    rgb,
    speckled,
    stripes,
    wood,
)


class Builder:
    """Collector of the solids of a stage."""

    def __init__(self) -> None:
        self.solids: list[Solid] = []

    def add(self, kind: str, centre, size, texture: Texture, yaw: float = 0.0,
            turn: Array | None = None, **look) -> None:
        """Add a Solid, turned by yaw radians about z or by turn [3, 3]; look holds its gloss and the like."""
        if turn is None:
            c, s = np.cos(yaw), np.sin(yaw)
            turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        self.solids.append(Solid(kind, np.asarray(centre, float), np.asarray(size, float), texture,
                                 turn, **look))

    def rod(self, a, b, radius: float, texture: Texture, **look) -> None:
        """Add a cylinder from a to b."""
        a, b = np.asarray(a, float), np.asarray(b, float)
        axis = (b - a) / np.linalg.norm(b - a)
        side = np.cross(axis, [1, 0, 0] if abs(axis[0]) < 0.9 else [0, 1, 0])
        side /= np.linalg.norm(side)
        turn = np.stack([side, np.cross(axis, side), axis], 1)
        self.add("cylinder", (a + b) / 2, (radius, radius, np.linalg.norm(b - a) / 2), texture,
                 turn=turn, **look)

    def ball(self, centre, radius: float, texture: Texture, **look) -> None:
        """Add a sphere."""
        self.add("ellipsoid", centre, (radius,) * 3, texture, **look)


def courtyard(rng: np.random.Generator) -> Stage:
    """Build a paved yard between walls: a fountain with a mirror ball, a fence, trees, lamps on a wire."""
    b = Builder()
    iron, wall = speckled("#30363c", 0.3), bricks("#b4694e", "#cbbfae", 0.42, 0.16)
    b.add("box", (0, 0, -0.25), (9, 9, 0.25), bricks("#9b978f", "#5a564f", 0.5, 0.36, 0.05))
    for i in range(4):  # walls with windows and a ledge
        a = i * np.pi / 2
        out, along = np.array([np.cos(a), np.sin(a), 0]), np.array([-np.sin(a), np.cos(a), 0])
        b.add("box", 6.5 * out + [0, 0, 1.3], (0.2, 6.7, 1.3), wall, yaw=a)
        b.add("box", 6.4 * out + [0, 0, 2.65], (0.4, 6.8, 0.07), speckled("#d8cdb8", 0.15), yaw=a)
        for x in (-4.2, -1.4, 1.4, 4.2):
            b.add("box", 6.3 * out + x * along + [0, 0, 1.4], (0.06, 0.55, 0.7), speckled("#e6e1d3", 0.1),
                  yaw=a)
            b.add("box", 6.25 * out + x * along + [0, 0, 1.4], (0.04, 0.45, 0.6),
                  checker("#26384f", "#4d6f91", 0.3), yaw=a, gloss=0.8, shine=80)
    # the fountain
    b.add("cylinder", (0, 0, 0.2), (1.15, 1.15, 0.2), bricks("#b9b2a3", "#6c675d", 0.4, 0.2))
    b.add("cylinder", (0, 0, 0.405), (1.0, 1.0, 0.02), speckled("#2f6f86", 0.5, 0.9), gloss=0.9, shine=120,
          mirror=0.25)
    b.add("torus", (0, 0, 0.42), (1.08, 0.09, 0), speckled("#d3cab8", 0.25), gloss=0.2)
    b.add("cylinder", (0, 0, 0.75), (0.16, 0.16, 0.36), stripes("#c9bfa9", "#9c917b", 0.06, 0))
    b.add("ellipsoid", (0, 0, 1.12), (0.55, 0.55, 0.12), speckled("#cfc5b0", 0.3), gloss=0.2)
    b.ball((0, 0, 1.52), 0.34, speckled("#f0f0f0", 0.0), gloss=1.0, shine=300, mirror=0.85)
    # an iron fence round a quarter of the fountain
    posts = [(1.9 * np.cos(a), 1.9 * np.sin(a)) for a in np.linspace(0.2, 2.1, 17)]
    for i, (x, y) in enumerate(posts):
        b.rod((x, y, 0), (x, y, 0.75), 0.016, iron, gloss=0.5)
        b.ball((x, y, 0.78), 0.035, speckled("#caa03c", 0.1), gloss=0.8, shine=60)
        if i:
            for z in (0.12, 0.66):
                b.rod((*posts[i - 1], z), (x, y, z), 0.012, iron)
    # lamps and the wire between them
    lamps = [(-1.9, 1.5), (-1.7, -1.9), (2.0, -1.6)]
    for x, y in lamps:
        b.rod((x, y, 0), (x, y, 2.1), 0.035, iron, gloss=0.5)
        b.add("cylinder", (x, y, 0.06), (0.14, 0.14, 0.06), iron)
        b.ball((x, y, 2.22), 0.15, stripes("#fff2cf", "#f3d58c", 0.07), gloss=0.9, shine=30)
    for p, q in pairwise(lamps):
        drop = [(*(np.array(p) + s * (np.array(q) - p)), 2.05 - 1.2 * s * (1 - s))
                for s in np.linspace(0, 1, 9)]
        for u, v in pairwise(drop):
            b.rod(u, v, 0.009, iron)
        for i, hang in enumerate(drop[1:-1]):
            b.ball((hang[0], hang[1], hang[2] - 0.06), 0.05,
                   speckled(("#d8412f", "#2f7fd8", "#e8b52a")[i % 3], 0.1),
                   gloss=0.7)
    # trees in tubs
    for x, y, h in ((1.5, -0.3, 1.5), (-1.5, 0.1, 1.2), (0.3, -1.75, 1.0)):
        b.add("cylinder", (x, y, 0.16), (0.24, 0.24, 0.16), wood("#a9713f", "#6b4323"), gloss=0.1)
        b.rod((x, y, 0.3), (x, y, h), 0.04, wood("#7a5a3c", "#4b3422"))
        for _ in range(7):
            way = rng.normal(size=3) * [0.2, 0.2, 0.16]
            b.ball((x + way[0], y + way[1], h + 0.1 + way[2]), rng.uniform(0.13, 0.24),
                   speckled(str(rng.choice(["#4f7d2c", "#6d9a35", "#3c6a33"])), 0.9, 0.35))
    # a bench and boxes
    for i in range(4):
        b.add("box", (-0.2, 1.72 + 0.11 * i, 0.42), (0.75, 0.042, 0.02), wood("#b98a52", "#7c5427"),
              gloss=0.15)
        b.add("box", (-0.2, 2.12, 0.55 + 0.12 * i), (0.75, 0.02, 0.045), wood("#b98a52", "#7c5427"),
              gloss=0.15)
    for x in (-0.85, 0.45):
        b.rod((x, 1.75, 0), (x, 1.75, 0.41), 0.025, iron)
        b.rod((x, 2.15, 0), (x, 2.15, 0.98), 0.025, iron)
    b.add("box", (1.0, -1.6, 0.2), (0.2, 0.2, 0.2), checker("#e9dfc9", "#b03a2e", 0.1), yaw=0.5)
    b.add("box", (-1.0, -1.15, 0.13), (0.28, 0.13, 0.13), wood("#d2a86a", "#96682f", 0.065), yaw=-0.4)
    zenith, horizon = rgb("#4a86cf"), rgb("#dfe9f2")

    def sky(d: Array) -> Array:
        up = np.clip(d[:, 2:], 0, 1) ** 0.6
        clouds = np.clip(noise(d / (np.abs(d[:, 2:]) + 0.25), 3.0) - 0.1, 0, 0.7)[:, None]
        return (horizon + (zenith - horizon) * up) * (1 - clouds) + clouds * rgb("#ffffff")

    return Stage(b.solids, sky, np.array([9.0, -7.0, 16.0]), np.array([0.85, 0.8, 0.7]),
                 np.array([0.36, 0.4, 0.48]))


def studio(rng: np.random.Generator) -> Stage:
    """Build a workshop: a table with a still life and a chrome ball, a tripod, a stool, shelves, pictures."""
    b = Builder()
    oak, pine, steel = wood("#c99a5e", "#8a5a2b"), wood("#e2c08a", "#b98c4f"), speckled("#6d7278", 0.15)
    b.add("box", (0, 0, -0.1), (6, 6, 0.1), wood("#a87748", "#744a26", 0.28), gloss=0.15)
    b.add("room", (0, 0, 1.6), (5, 5, 1.75), bricks("#c9cdc4", "#b3b6ac", 0.9, 0.45, 0.03))
    hues = ("#b5432f", "#2f5fa8", "#d9a520", "#3d7a4a", "#6b4a8c", "#d07a3a", "#2a8c8c")
    for i in range(4):  # pictures and shelves round the walls
        a = i * np.pi / 2
        out, along = np.array([np.cos(a), np.sin(a), 0]), np.array([-np.sin(a), np.cos(a), 0])
        for j, x in enumerate((-3.2, -0.2, 2.9)):
            b.add("box", 4.95 * out + x * along + [0, 0, 2.0], (0.04, 0.75, 0.55), oak, yaw=a)
            art = (checker if (i + j) % 2 else stripes)(hues[(i + 2 * j) % 7], hues[(3 * i + j + 1) % 7],
                                                        0.17)
            b.add("box", 4.9 * out + x * along + [0, 0, 2.0], (0.03, 0.66, 0.46), art, yaw=a)
        b.add("box", 4.75 * out + [0, 0, 1.15], (0.22, 4.2, 0.03), pine, yaw=a)
        for x in np.arange(-3.9, 3.9, 0.42):
            h = rng.uniform(0.1, 0.2)
            b.add("box", 4.75 * out + x * along + [0, 0, 1.18 + h], (0.15, rng.uniform(0.06, 0.17), h),
                  speckled(str(rng.choice(hues)), 0.3), yaw=a)
    # the table
    b.add("box", (0, 0, 0.72), (1.05, 0.7, 0.035), wood("#b67f45", "#7b4b22", 0.2), gloss=0.25, shine=60)
    for x in (-0.95, 0.95):
        for y in (-0.6, 0.6):
            b.rod((x, y, 0), (0.96 * x, 0.96 * y, 0.69), 0.03, oak)
        b.rod((x, -0.6, 0.2), (x, 0.6, 0.2), 0.018, oak)
    # the still life
    b.ball((0.1, 0.05, 1.02), 0.26, speckled("#f4f4f4", 0.0), gloss=1.0, shine=400, mirror=0.9)
    for i, (w, d, yaw) in enumerate(((0.26, 0.18, 0.1), (0.24, 0.17, -0.15), (0.2, 0.15, 0.35),
                                     (0.21, 0.13, 0.0))):
        b.add("box", (-0.6, 0.3, 0.785 + 0.062 * i), (w, d, 0.03), stripes(hues[i], "#f0e8d8", 0.048),
              yaw=yaw, gloss=0.1)
    b.ball((-0.6, 0.3, 1.1), 0.1, speckled("#c8362c", 0.35, 0.3), gloss=0.7)
    b.add("cylinder", (-0.55, -0.3, 0.84), (0.1, 0.1, 0.085), checker("#f2efe6", "#2d5d9b", 0.052), gloss=0.6)
    b.add("torus", (-0.44, -0.3, 0.84), (0.062, 0.016, 0), speckled("#2d5d9b", 0.1), gloss=0.6,
          turn=np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]))
    b.add("torus", (0.62, -0.32, 0.83), (0.2, 0.075, 0), stripes("#e8b040", "#5a2d82", 0.035, 0), gloss=0.5)
    b.add("ellipsoid", (0.66, 0.34, 0.93), (0.15, 0.15, 0.19), bricks("#3c8d86", "#e9e2cf", 0.07, 0.04, 0.12),
          gloss=0.9, shine=90)
    b.add("cylinder", (0.66, 0.34, 1.13), (0.06, 0.06, 0.06), speckled("#3c8d86", 0.2), gloss=0.6)
    for _ in range(9):  # twigs in the vase
        tip = np.array([0.66, 0.34, 1.62]) + rng.normal(size=3) * [0.17, 0.17, 0.1]
        b.rod((0.66, 0.34, 1.15), tip, 0.007, speckled("#5b4630", 0.3))
        b.ball(tip, rng.uniform(0.025, 0.045),
               speckled(str(rng.choice(["#e86a8a", "#f4c04a", "#ffffff"])), 0.2))
    for x, y, s in ((0.35, -0.5, 0.05), (0.2, -0.42, 0.06), (-0.15, -0.45, 0.045), (-0.2, 0.5, 0.07)):
        b.add("box", (x, y, 0.755 + s), (s, s, s), checker(hues[int(100 * s) % 7], "#f2e6cc", s), yaw=20 * s,
              gloss=0.2)
    # a tripod with a camera on it
    top = np.array([-1.75, -0.9, 1.25])
    for a in (0.3, 2.4, 4.5):
        b.rod(top, top * [1, 1, 0] + 0.45 * np.array([np.cos(a), np.sin(a), 0]), 0.02, steel, gloss=0.6)
    b.rod(top, top + [0, 0, 0.2], 0.025, steel, gloss=0.6)
    b.add("box", top + [0, 0, 0.3], (0.17, 0.11, 0.11), speckled("#22252a", 0.5, 0.3), yaw=0.4, gloss=0.5)
    b.rod(top + [0.12, 0.06, 0.3], top + [0.32, 0.15, 0.3], 0.075, stripes("#15171a", "#4a4e55", 0.03),
          gloss=0.6)
    # a stool, a ladder, a plant
    b.add("cylinder", (1.7, 0.7, 0.6), (0.25, 0.25, 0.03), stripes("#c7473a", "#f0e2c8", 0.11, 0))
    for a in np.arange(3) * 2.1:
        way = np.array([np.cos(a), np.sin(a), 0])
        b.rod(np.array([1.7, 0.7, 0.58]) + 0.15 * way, np.array([1.7, 0.7, 0]) + 0.27 * way, 0.02, steel,
              gloss=0.6)
    for x in (-0.25, 0.25):
        b.rod((0.6 + x, 1.5, 0), (0.6 + 0.8 * x, 1.9, 1.9), 0.028, pine)
    for s in np.arange(0.12, 1, 0.15):
        w = 0.25 - 0.05 * s
        b.rod((0.6 - w, 1.5 + 0.4 * s, 1.9 * s), (0.6 + w, 1.5 + 0.4 * s, 1.9 * s), 0.017, pine)
    b.add("cylinder", (-1.2, 1.4, 0.2), (0.22, 0.22, 0.2), bricks("#c4703f", "#8f4a26", 0.12, 0.08, 0.08))
    for _ in range(16):
        way = rng.normal(size=3) * [0.22, 0.22, 0.22]
        b.add("ellipsoid", np.array([-1.2, 1.4, 0.72]) + way, (0.17, 0.06, 0.035),
              speckled("#4f8a3a", 0.6, 0.3), yaw=rng.uniform(0, 6.3), gloss=0.2)
    # the shade of a hanging lamp; the light source itself is elsewhere
    b.rod((-0.35, 0.1, 2.0), (-0.35, 0.1, 3.3), 0.009, speckled("#202020", 0))
    b.add("ellipsoid", (-0.35, 0.1, 1.98), (0.24, 0.24, 0.11), stripes("#e5c23c", "#c98a1c", 0.06, 0),
          gloss=0.6)
    return Stage(b.solids, lambda d: np.zeros_like(d), np.array([2.2, -2.6, 3.2]),
                 np.array([0.85, 0.78, 0.66]), np.array([0.34, 0.36, 0.4]))


STAGES = {"courtyard": courtyard, "studio": studio}
