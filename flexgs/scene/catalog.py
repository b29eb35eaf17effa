"""Which captures there are in a folder of captures."""

from pathlib import Path

from flexgs.errors import UserError
from flexgs.scene.colmap import find_model
from flexgs.scene.transforms import find_transforms

SOURCES = {
    "Mip-NeRF 360": ("https://jonbarron.info/mipnerf360/",
                     "bicycle bonsai counter flowers garden kitchen room stump treehill"),
    "Tanks and Temples": ("https://www.tanksandtemples.org/download/", "train truck"),
    "Zip-NeRF": ("https://jonbarron.info/zipnerf/", "alameda berlin london nyc"),
}
"""Where the captures of the paper and their like are to be had."""


def how_to_get(name: str) -> str:
    """Half a sentence about a capture of SOURCES, empty for others."""
    for dataset, (url, names) in SOURCES.items():
        if name in names.split():
            return f"; {name} is a capture of {dataset}, to be had at {url}"
    return ""


def find_scenes(data_root: str | Path, names: list[str] | None = None) -> list[Path]:
    """The folders right under data_root that hold a capture, sorted by name; or those of these names, in that order.

    UserError if data_root is no folder, holds no capture, or has none of some name.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected a folder of captures"
                        + "".join(map(how_to_get, names or ())))
    found = {path.name: path for path in sorted(root.iterdir()) if is_capture(path)}
    if not found:
        inside = " (it is itself a capture: give the folder that it is in)" if is_capture(root) else ""
        raise UserError(f"{root}: no capture here{inside}; expected folders with sparse/0 or transforms.json in them"
                        + "".join(map(how_to_get, names or ())))
    if unknown := [name for name in names or () if name not in found]:
        raise UserError(f"{root}: no capture named {', '.join(unknown)}; found {', '.join(found)}"
                        + "".join(map(how_to_get, unknown)))
    return [found[name] for name in names] if names else list(found.values())


def is_capture(path: Path) -> bool:
    """Whether the folder looks like something that load_scene reads; hidden folders do not."""
    return path.is_dir() and not path.name.startswith(".") and bool(find_model(path) or find_transforms(path))
