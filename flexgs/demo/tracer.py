"""A small ray tracer for the photographs of the built-in scenes.

Solids are ellipsoids, boxes, cylinders and tori, each in its own coordinate frame, with procedural textures
and Blinn highlights. There is one lamp that casts shadows, and one mirror bounce. Colours are linear until
develop() converts a photograph to sRGB.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
from scipy import ndimage

Array = np.ndarray
Texture = Callable[[Array, Array], Array]
"""Function (positions in the solid's frame [n, 3], on its unrolled surface [n, 2]) -> linear rgb [n, 3]."""

FAR = 1e9
"""Distance of a ray that hits nothing."""
NEAR = 2e-3
"""Least distance of a hit, so that a ray that leaves a surface does not hit it again."""


@dataclass(eq=False)
class Solid:
    """One solid of a stage; lengths are in metres."""

    kind: str
    """One of KINDS; a room is a box seen from within, and z is the axis of a cylinder or torus."""
    centre: Array
    """Position of the centre in the world [3]."""
    size: Array
    """Half lengths along the axes [3]; for a torus, the radii of the ring and of the tube and an unused 0."""
    texture: Texture
    turn: Array
    """Rotation [3, 3] whose columns are the axes of the solid in the world."""
    gloss: float = 0.0
    """Strength of the highlight."""
    shine: float = 40.0
    """Exponent of the highlight."""
    mirror: float = 0.0
    """Fraction of the light that is reflected, 0 to 1."""

    @property
    def bound(self) -> float:
        """Radius of a sphere around centre that encloses the solid."""
        a, b, c = self.size
        bounds = {"ellipsoid": max(a, b, c), "cylinder": (a * a + c * c) ** 0.5, "torus": a + b, "room": 1e3}
        return bounds.get(self.kind, (a * a + b * b + c * c) ** 0.5)


@dataclass(eq=False)
class Stage:
    """Everything that can be photographed: solids, sky and light."""

    solids: list[Solid]
    sky: Callable[[Array], Array]
    """Function from directions [n, 3] to linear rgb [n, 3] for rays that hit nothing."""
    lamp: Array
    """Position [3] of the lamp that casts shadows."""
    lamp_colour: Array
    """Light of the lamp, linear rgb [3]."""
    ambient: Array
    """Light from everywhere, a little more from above, linear rgb [3]."""


# -- shapes, each in its own frame ---------------------------------------------------------------------------

KINDS = ("ellipsoid", "box", "room", "cylinder", "torus")


@numba.njit(cache=True, nogil=True)
def _between(near: float, far: float, o: float, d: float, half: float) -> tuple[float, float]:
    """Clip the part (near, far) of a ray to where its coordinate o + t d is between -half and half."""
    d = d if abs(d) > 1e-9 else 1e-9
    a, b = (-half - o) / d, (half - o) / d
    return max(near, min(a, b)), min(far, max(a, b))


@numba.njit(cache=True, nogil=True)
def _hit(kind: int, ox: float, oy: float, oz: float, dx: float, dy: float, dz: float, size: Array) -> float:
    """Compute the distance at which a ray from o in unit direction d hits a solid, in its frame, or FAR."""
    near, far = -FAR, FAR
    if kind == 0:
        ox, oy, oz, dx, dy, dz = (ox / size[0], oy / size[1], oz / size[2], dx / size[0], dy / size[1],
                                  dz / size[2])
        a, b = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz
        gap = b * b - a * (ox * ox + oy * oy + oz * oz - 1)
        if gap <= 0:
            return FAR
        near, far = (-b - gap ** 0.5) / a, (-b + gap ** 0.5) / a
    elif kind == 4:
        b = ox * dx + oy * dy + oz * dz
        t = max(-b - size[0] - size[1], NEAR)
        for _ in range(64):  # step by the distance to the surface
            x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
            step = (((x * x + y * y) ** 0.5 - size[0]) ** 2 + z * z) ** 0.5 - size[1]
            t += step
            if step < 1e-4 or t > size[0] + size[1] - b:
                break
        return t if step < 1e-3 and t > 4 * NEAR else FAR
    else:
        if kind == 3:
            a, b = dx * dx + dy * dy + 1e-12, ox * dx + oy * dy
            gap = b * b - a * (ox * ox + oy * oy - size[0] ** 2)
            if gap <= 0:
                return FAR
            near, far = (-b - gap ** 0.5) / a, (-b + gap ** 0.5) / a
        else:
            near, far = _between(near, far, ox, dx, size[0])
            near, far = _between(near, far, oy, dy, size[1])
        near, far = _between(near, far, oz, dz, size[2])
    if near >= far:
        return FAR
    if kind == 2:
        return far
    if near > NEAR:
        return near
    return far if kind == 0 and far > NEAR else FAR


@numba.njit(cache=True, nogil=True)
def _first_hits(o: Array, d: Array, end: Array, among: Array, kind: Array, centre: Array, turn: Array,
                size: Array, bound: Array) -> tuple[Array, Array]:
    """Find the first hit of each ray with the solids whose numbers are in among.

    Returns the distance [n] and the number of the solid [n], or end and -1 for no hit nearer than end [n].
    """
    distance, which = end.copy(), np.full(len(d), -1)
    for i in range(len(d)):
        p, q = o[i if len(o) > 1 else 0], d[i]
        for k in among:
            x, y, z = p[0] - centre[k, 0], p[1] - centre[k, 1], p[2] - centre[k, 2]
            middle = -(x * q[0] + y * q[1] + z * q[2])
            if (middle < -bound[k] or middle - bound[k] > distance[i]
                    or x * x + y * y + z * z - middle * middle > bound[k] ** 2):
                continue
            f = turn[k]
            t = _hit(kind[k],
                     x * f[0, 0] + y * f[1, 0] + z * f[2, 0], x * f[0, 1] + y * f[1, 1] + z * f[2, 1],
                     x * f[0, 2] + y * f[1, 2] + z * f[2, 2],
                     q[0] * f[0, 0] + q[1] * f[1, 0] + q[2] * f[2, 0],
                     q[0] * f[0, 1] + q[1] * f[1, 1] + q[2] * f[2, 1],
                     q[0] * f[0, 2] + q[1] * f[1, 2] + q[2] * f[2, 2], size[k])
            if t < distance[i]:
                distance[i], which[i] = t, k
    return distance, which


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("ij,ij->i", a, b)


def _normal(solid: Solid, p: Array) -> Array:
    if solid.kind == "ellipsoid":
        n = p / np.square(solid.size)
    elif solid.kind == "torus":
        ring = p * [1, 1, 0]
        n = p - ring * (solid.size[0] / np.maximum(np.linalg.norm(ring, axis=1, keepdims=True), 1e-6))
    elif solid.kind == "cylinder":
        cap = np.abs(p[:, 2]) > solid.size[2] * 0.9999
        n = np.where(cap[:, None], p * [0, 0, 1], p * [1, 1, 0])
    else:
        q = np.abs(p / solid.size)
        n = np.where(q == q.max(1, keepdims=True), np.sign(p), 0) * (-1 if solid.kind == "room" else 1)
    return n / np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-9)


def _unrolled(solid: Solid, p: Array, n: Array) -> Array:
    """Compute coordinates [n, 2] on the surface, in metres, for flat patterns."""
    if solid.kind in ("box", "room"):
        face = np.abs(n).argmax(1)
        u = np.where(face == 0, p[:, 1], p[:, 0])
        return np.stack([u + 7.3 * face, np.where(face == 2, p[:, 1], p[:, 2])], 1)
    radius = solid.size[0]
    return np.stack([np.arctan2(p[:, 1], p[:, 0]) * radius, p[:, 2]], 1)


# -- light ---------------------------------------------------------------------------------------------------

class Tracer:
    """Ray tracer of one stage."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.centres = np.array([s.centre for s in stage.solids])
        self.turns = np.array([s.turn for s in stage.solids])
        self.sizes = np.array([s.size for s in stage.solids])
        self.bounds = np.array([s.bound for s in stage.solids])
        self.kinds = np.array([KINDS.index(s.kind) for s in stage.solids])

    def colours(self, o: Array, d: Array) -> Array:
        """Compute linear rgb [n, 3] of rays from the point o [3] in unit directions d [n, 3].

        It is fastest with some thousand rays at a time in nearly the same direction.
        """
        return self._colours(o[None], d, bounces=1)

    def distances(self, o: Array, d: Array) -> Array:
        """Compute the distances [n] at which rays from o [3] in unit directions d [n, 3] hit; FAR for sky."""
        return self._nearest(o[None], d, np.full(len(d), FAR))[0]

    def _nearest(self, o: Array, d: Array, end: Array) -> tuple[Array, Array]:
        """Find the first hit of each ray as _first_hits does, among the solids that the rays can meet."""
        among = self._in_cone(o[0], d, end.max()) if len(o) == 1 and len(d) else np.arange(len(self.kinds))
        return _first_hits(o, d, end, among, self.kinds, self.centres, self.turns, self.sizes, self.bounds)

    def _in_cone(self, o: Array, d: Array, end: float) -> Array:
        """List the solids that rays from o in these directions can meet before end, the nearest first."""
        axis = d.mean(0)
        axis /= np.linalg.norm(axis)
        way = self.centres - o
        distance = np.linalg.norm(way, axis=1)
        width = np.arccos(np.clip((d @ axis).min(), -1, 1)) + np.arcsin(np.clip(self.bounds / distance, 0, 1))
        aside = np.arccos(np.clip(way @ axis / distance, -1, 1))
        reached = (distance <= self.bounds) | ((aside <= width + 1e-3) & (distance - self.bounds < end))
        order = np.argsort(distance - self.bounds * (self.bounds < 100))
        return order[reached[order]]

    def _colours(self, o: Array, d: Array, bounces: int) -> Array:
        t, which = self._nearest(o, d, np.full(len(d), FAR))
        p, rgb, normal = o + t[:, None] * d, np.zeros((len(d), 3)), np.zeros((len(d), 3))
        gloss, shine, mirror = np.zeros((3, len(d)))
        for k in np.unique(which):
            rays = np.flatnonzero(which == k)
            if k < 0:
                rgb[rays] = self.stage.sky(d[rays])
                continue
            solid = self.stage.solids[k]
            local = (p[rays] - solid.centre) @ solid.turn
            n = _normal(solid, local)
            rgb[rays] = solid.texture(local, _unrolled(solid, local, n))
            normal[rays] = n @ solid.turn.T
            gloss[rays], shine[rays], mirror[rays] = solid.gloss, solid.shine, solid.mirror
        rays = np.flatnonzero(which >= 0)
        rgb[rays] = self._shaded(p[rays], d[rays], normal[rays], rgb[rays], gloss[rays], shine[rays])
        if bounces and len(rays := np.flatnonzero(mirror)):
            n, reflected = normal[rays], mirror[rays, None]
            out = d[rays] - 2 * _dot(d[rays], n)[:, None] * n
            rgb[rays] = (1 - reflected) * rgb[rays] + reflected * self._colours(p[rays], out, bounces - 1)
        return rgb

    def _shaded(self, p: Array, d: Array, n: Array, albedo: Array, gloss: Array, shine: Array) -> Array:
        lamp = self.stage.lamp
        light = lamp - p
        distance = np.sqrt(_dot(light, light))
        light /= distance[:, None]
        facing = _dot(n, light)
        lit = np.flatnonzero(facing > 0)
        # Shadow rays start at the lamp, so that they form one narrow cone.
        _, blocker = self._nearest(lamp[None], -light[lit], distance[lit] - 2 * NEAR)
        facing = np.maximum(facing, 0)
        facing[lit[blocker >= 0]] = 0
        half = light - d
        half /= np.sqrt(_dot(half, half))[:, None]
        spot = gloss * np.maximum(_dot(n, half), 0) ** shine * (facing > 0)
        return (albedo * (self.stage.ambient * (0.75 + 0.25 * n[:, 2:])
                          + facing[:, None] * self.stage.lamp_colour)
                + spot[:, None] * self.stage.lamp_colour)


def develop(rgb: Array) -> Array:
    """Convert linear rgb to sRGB uint8 (IEC 61966-2-1)."""
    rgb = np.clip(rgb, 0, 1)
    srgb = np.where(rgb < 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    return np.round(255 * srgb).astype(np.uint8)


# -- textures ------------------------------------------------------------------------------------------------

def _cloud(seed: int, size: int = 64) -> Array:
    """Draw smooth periodic noise [size, size, size] of five octaves, mean 0, about -1 to 1."""
    rng, total = np.random.default_rng(seed), np.zeros((size,) * 3, np.float32)
    for octave in range(5):
        cells = rng.standard_normal((4 << octave,) * 3).astype(np.float32)
        total += ndimage.zoom(cells, size / len(cells), order=1, mode="grid-wrap",
                              grid_mode=True) * 0.6 ** octave
    return total / (2 * total.std())


_CLOUD = _cloud(7)


def noise(p: Array, scale: float) -> Array:
    """Evaluate smooth noise [n], about -1 to 1, at positions [n, 3] in metres; it repeats after scale."""
    return ndimage.map_coordinates(_CLOUD, p.T * (64 / scale), order=1, mode="grid-wrap")


def _random(row: Array, column: Array) -> Array:
    """Hash integer cells to numbers from 0 to 1, [n]."""
    mixed = row.astype(np.int64) * 73856093 + column.astype(np.int64) * 19349663
    return (mixed * 40503 >> 8) % 65536 / 65536


def rgb(text: str) -> Array:
    """Convert a colour such as "#c08040" to linear rgb [3]."""
    c = np.array([int(text[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c < 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def speckled(colour: str, amount: float = 0.35, scale: float = 0.8) -> Texture:
    """Make a texture of one colour whose brightness varies by amount with noise of this scale."""
    base = rgb(colour)
    return lambda p, uv: base * (1 + amount * noise(p, scale))[:, None].clip(0.1)


def checker(a: str, b: str, cell: float) -> Texture:
    """Make a checkerboard of two colours with squares of side cell."""
    ca, cb = rgb(a), rgb(b)

    def texture(p: Array, uv: Array) -> Array:
        i = np.floor(uv / cell)
        return np.where((i.sum(1) % 2 == 0)[:, None], ca, cb) * (1 + 0.15 * noise(p, 1.0))[:, None]
    return texture


def bricks(stone: str, joint: str, width: float, height: float, gap: float = 0.06) -> Texture:
    """Make a brick wall; gap is the width of the joint around each brick as a fraction of its height."""
    cs, cj = rgb(stone), rgb(joint)

    def texture(p: Array, uv: Array) -> Array:
        row = np.floor(uv[:, 1] / height)
        x = uv[:, 0] / width + 0.5 * (row % 2)
        column = np.floor(x)
        inside = ((np.abs(x - column - 0.5) < 0.5 - gap * height / width)
                  & (np.abs(uv[:, 1] / height - row - 0.5) < 0.5 - gap))
        tone = (0.7 + 0.6 * _random(row, column)) * (1 + 0.25 * noise(p, 0.7))
        return np.where(inside[:, None], cs * tone[:, None], cj)
    return texture


def wood(light: str, dark: str, plank: float = 0.0) -> Texture:
    """Make wood with grain between two colours, in planks of this width; 0 for one piece."""
    cl, cd = rgb(light), rgb(dark)

    def texture(p: Array, uv: Array) -> Array:
        lane = np.floor(uv[:, 1] / plank) if plank else np.zeros(len(p))
        shifted = p * [0.25, 1, 1] + (lane * 0.37)[:, None]
        grain = 0.5 + 0.5 * np.sin(26 * (shifted[:, 1] + shifted[:, 2]) + 5 * noise(shifted, 1.3))
        tone = (0.8 + 0.4 * _random(lane, lane)) * (1 + 0.2 * noise(p * [0.15, 1, 1], 0.4))
        if plank:
            tone = np.where(np.abs(uv[:, 1] / plank - lane - 0.5) > 0.47, 0.35, tone)
        return (cd + (cl - cd) * grain[:, None]) * tone[:, None]
    return texture


def stripes(a: str, b: str, cell: float, axis: int = 1) -> Texture:
    """Make stripes of two colours and width cell across an axis of the unrolled surface."""
    ca, cb = rgb(a), rgb(b)

    def texture(p: Array, uv: Array) -> Array:
        even = np.floor(uv[:, axis] / cell) % 2 == 0
        return np.where(even[:, None], ca, cb) * (1 + 0.12 * noise(p, 0.6))[:, None]
    return texture
