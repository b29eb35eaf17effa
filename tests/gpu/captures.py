"""The captures that a study looks at: real ones in a folder, or the built-in one."""

from dataclasses import dataclass
from pathlib import Path

from flexgs.demo.synthetic import write_synthetic
from flexgs.errors import UserError
from tests.gpu.record import Study


@dataclass
class OfCaptures(Study):
    scenes: Path | None = None
    """Folder of captures; without one, the built-in studio."""
    names: tuple[str, ...] = ()
    """Of these captures; default: all."""

    def captures(self) -> list[Path]:
        if self.scenes is None:
            views, width, height = (10, 64, 48) if self.tiny else (48, 416, 312)
            folder = self.output / "captures" / f"{width}x{height}" / "studio"
            return [folder if folder.is_dir()
                    else write_synthetic("studio", folder, views=views, width=width, height=height)]
        if not self.scenes.is_dir():
            raise UserError(f"--scenes {self.scenes}: no such folder; expected a folder of captures")
        found = {path.name: path for path in sorted(self.scenes.iterdir()) if path.is_dir()}
        if unknown := set(self.names) - set(found):
            raise UserError(f"--names {' '.join(sorted(unknown))}: expected some of those in "
                            f"{self.scenes}: {', '.join(found)}")
        return [path for name, path in found.items() if not self.names or name in self.names]
