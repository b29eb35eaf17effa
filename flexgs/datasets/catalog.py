"""The captures that the field measures on: where to get them and what they hold; captures in a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgs.errors import UserError
from flexgs.scene.colmap import find_models
from flexgs.scene.transforms import find_transforms


@dataclass(frozen=True)
class Archive:
    """A zip file on the web."""

    url: str
    file: str
    """Name of the file in the folder of downloads, where it may also be put by hand."""
    gigabytes: float | None = None
    """Size of the download, about; None if unknown."""
    sha256: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Captures that were released together."""

    title: str
    page: str
    licence: str
    """Licence as the source states it."""
    camera: str
    """COLMAP's name of the camera model."""
    smaller: tuple[int, ...] = ()
    """Factors by which images were reduced, each in a folder images_<factor>."""


@dataclass(frozen=True)
class Known:
    """A capture that can be downloaded."""

    name: str
    dataset: str
    """A key of DATASETS."""
    archive: Archive
    inside: str
    """Folder of the capture in the archive."""
    factor: int
    """Factor of image reduction at which the field usually measures the capture; see PROTOCOLS."""
    images: int | None = None
    """Number of images; None if unknown."""
    size: tuple[int, int] | None = None
    """Width and height in pixels of an image at `factor`; None if unknown."""

    def factor_of(self, protocol: str) -> int:
        """Return the factor of image reduction under one of PROTOCOLS."""
        return self.factor if protocol == "standard" else 4

    def memory(self, factor: int) -> int | None:
        """Return about how many bytes all decoded images take at a factor; None if unknown."""
        if self.images is None or self.size is None:
            return None
        return round(3 * self.images * self.size[0] * self.size[1] * (self.factor / factor) ** 2)

    def find(self, data_root: Path) -> Path | None:
        """Return DATA_ROOT/<name> or DATA_ROOT/<dataset>/<name>, whichever is a capture; None if none is."""
        places = (data_root / self.name, data_root / self.dataset / self.name)
        return next((place for place in places if is_capture(place)), None)


PROTOCOLS = ("paper", "standard")
"""How images are reduced: paper: every capture by 4, as in FlexGS's README (`--resolution 4`); standard: each
dataset as it is usually measured."""

DATASETS = {
    # Released as photographs, images_2, images_4, images_8, sparse/0 and poses_bounds.npy, undistorted.
    "mipnerf360": Dataset("Mip-NeRF 360", "https://jonbarron.info/mipnerf360/", "unknown", "PINHOLE",
                          (2, 4, 8)),
    # The next two have the images and reconstructions of the 3DGS release: images and sparse/0. The cameras
    # of train and truck are calibrated for images twice as large as those there, which load_scene allows for.
    "tanksandtemples": Dataset("Tanks and Temples", "https://www.tanksandtemples.org/",
                               "CC BY-NC-SA 3.0, for non-commercial research only", "PINHOLE"),
    "deepblending": Dataset("Deep Blending", "http://visual.cs.ucl.ac.uk/pubs/deepblending/", "unknown",
                            "PINHOLE"),
    # Zip-NeRF was photographed with fisheye lenses and released twice, as photographed and undistorted; the
    # folders are laid out as in Mip-NeRF 360.
    "zipnerf": Dataset("Zip-NeRF", "https://jonbarron.info/zipnerf/", "unknown", "PINHOLE", (2, 4, 8)),
    "zipnerf-fisheye": Dataset("Zip-NeRF with fisheye lenses", "https://jonbarron.info/zipnerf/", "unknown",
                               "OPENCV_FISHEYE", (2, 4, 8)),
}

_GOOGLE = "https://storage.googleapis.com/gresearch/refraw360"
_V2 = Archive(f"{_GOOGLE}/360_v2.zip", "360_v2.zip", 12.5)
_EXTRA = Archive(f"{_GOOGLE}/360_extra_scenes.zip", "360_extra_scenes.zip")
_TANDT = Archive("https://repo-sam.inria.fr/fungraph/3d-gaussian-splatting/datasets/input/tandt_db.zip",
                 "tandt_db.zip", 0.683, "816e62f22a161abbfe841d2a6b10cdf036e297c9fa289b3bfeee9c6ec526d7e1")
_ZIPNERF = ("berlin", "london", "nyc", "alameda")

CATALOG = {known.name: known for known in (
    Known("bicycle", "mipnerf360", _V2, "bicycle", 4, 194, (1237, 822)),
    Known("bonsai", "mipnerf360", _V2, "bonsai", 2, 292, (1559, 1039)),
    Known("counter", "mipnerf360", _V2, "counter", 2, 240, (1558, 1038)),
    Known("flowers", "mipnerf360", _EXTRA, "flowers", 4, 173, (1256, 828)),
    Known("garden", "mipnerf360", _V2, "garden", 4, 185, (1297, 840)),
    Known("kitchen", "mipnerf360", _V2, "kitchen", 2, 279, (1558, 1039)),
    Known("room", "mipnerf360", _V2, "room", 2, 311, (1557, 1038)),
    Known("stump", "mipnerf360", _V2, "stump", 4, 125, (1245, 825)),
    Known("treehill", "mipnerf360", _EXTRA, "treehill", 4, 141, (1267, 832)),
    Known("train", "tanksandtemples", _TANDT, "tandt/train", 1, 301, (980, 545)),
    Known("truck", "tanksandtemples", _TANDT, "tandt/truck", 1, 251, (979, 546)),
    Known("drjohnson", "deepblending", _TANDT, "db/drjohnson", 1, 263, (1332, 876)),
    Known("playroom", "deepblending", _TANDT, "db/playroom", 1, 225, (1264, 832)),
    *(Known(name, "zipnerf", Archive(f"{_GOOGLE}/zipnerf-undistorted/{name}.zip", f"zipnerf_{name}.zip"),
            name, 2) for name in _ZIPNERF),
    *(Known(f"{name}-fisheye", "zipnerf-fisheye",
            Archive(f"{_GOOGLE}/zipnerf/{name}.zip", f"zipnerf_fisheye_{name}.zip"),
            name, 4, 1984 if name == "london" else None) for name in _ZIPNERF),
)}
"""The known captures by name, which is also the name of the folder of a downloaded one.

Sources of the figures, none of them checked by a download:
URLs: gsplat's examples/datasets/download_dataset.py and the README of the 3DGS release.
Folders in the archives: nerfbaselines' datasets/mipnerf360.py and zipnerf.py; for tandt_db.zip, users of the
3DGS release. Its SHA-256: several projects agree on it.
Numbers and sizes of images: benches/README.md of DirectXSplat; for london-fisheye, pull request 1777 of
LichtFeld Studio, which also names the fisheye cameras of Zip-NeRF. Other cameras of Zip-NeRF: nerfbaselines.
Factors: 4 outdoors and 2 indoors as in nerfbaselines. Undistorted Zip-NeRF is measured at images_2 by
nerfbaselines and EVER; gsplat's scripts measure it and the fisheye images at images_4.
Licence of Tanks and Temples: the dataset's own terms.
"""


def how_to_get(name: str) -> str:
    """Return half a sentence, for the end of a message, about where to get a known capture; else ""."""
    if known := CATALOG.get(name):
        dataset = DATASETS[known.dataset]
        return (f"; {name} is a capture of {dataset.title}, to be had by `flexgs data get {name}` "
                f"or at {dataset.page}")
    return ""


def members(dataset: str) -> list[str]:
    """Return the names of the captures of a dataset."""
    return [known.name for known in CATALOG.values() if known.dataset == dataset]


def find_dataset(data_root: Path, dataset: str, names: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """Return the folders of a dataset's captures, or of those named, and the names of absent ones.

    UserError for a name that is not in the dataset, if all captures are absent, or if a named one is.
    """
    if strange := [name for name in names if name not in members(dataset)]:
        raise UserError(f"--scenes {' '.join(strange)}: not in {dataset}; expected of "
                        f"{', '.join(members(dataset))}")
    places = {name: CATALOG[name].find(data_root) for name in names or members(dataset)}
    found = [place for place in places.values() if place]
    absent = [name for name, place in places.items() if not place]
    if not found or (names and absent):
        raise UserError(f"{data_root}: found no capture {', '.join(absent)} of "
                        f"{DATASETS[dataset].title}, here or in {dataset}/; {_getting(absent, data_root)}, "
                        f"or unpack them there from {DATASETS[dataset].page}")
    return found, absent


def say_absent(dataset: str, absent: Sequence[str], data_root: Path) -> str:
    """Return a line about the captures of a dataset that are left out because they are absent."""
    return f"{dataset}: without {', '.join(absent)}, not under {data_root}; {_getting(absent, data_root)}"


def _getting(names: Sequence[str], data_root: Path) -> str:
    return f"`flexgs data get {' '.join(names)} --data-root {data_root}` downloads them"


def find_scenes(data_root: str | Path, names: list[str] | None = None,
                becomes_one: Callable[[Path], bool] = lambda folder: False) -> list[Path]:
    """Return the folders of captures directly in data_root by name, or of those named, in that order.

    becomes_one says which other folders count, such as photographs that a capture can be made of.
    UserError if data_root is no folder, holds no capture, or lacks a named one.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected "
                        "a folder of captures" + "".join(map(how_to_get, names or ())))
    itself = is_capture(root) or becomes_one(root)
    found = {path.name: path for path in sorted(root.iterdir())
             if is_capture(path) or (not itself and _is_open(path) and becomes_one(path))}
    if not found:
        inside = " (it is itself a capture: give the folder that it is in)" if itself else ""
        raise UserError(f"{root}: no capture here{inside}; expected folders with sparse/0 or "
                        "transforms.json in them" + "".join(map(how_to_get, names or ())))
    if unknown := [name for name in names or () if name not in found]:
        raise UserError(f"{root}: no capture named {', '.join(unknown)}; found {', '.join(found)}"
                        + "".join(map(how_to_get, unknown)))
    return [found[name] for name in names] if names else list(found.values())


def is_capture(path: Path) -> bool:
    """Whether the path is a folder, not a hidden one, with a model that load_scene reads."""
    return _is_open(path) and bool(find_models(path) or find_transforms(path))


def _is_open(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")
