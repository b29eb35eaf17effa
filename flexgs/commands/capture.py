"""flexgs capture: photographs or a video become a capture, with COLMAP."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from flexgs.errors import pasted
from flexgs.sfm.options import CaptureOptions


@dataclass
class CaptureCommand:
    """Make a capture of photographs or a video; the same command continues an unfinished one.

    `flexgs train` does the same by itself, with default options, if it is given photographs.
    """

    source: tyro.conf.Positional[Path]
    """Folder of photographs (JPEG, PNG, HEIC, TIFF, ...), with masks/ in or beside it, or a video."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the capture."""
    options: Annotated[CaptureOptions, tyro.conf.arg(name="")] = field(default_factory=CaptureOptions)

    def __call__(self) -> None:
        """Make the capture, and print what was found and the next command."""
        from flexgs.sfm.capture import make_capture

        make_capture(self.source, self.output, self.options)
        print(f"next:\n  flexgs train {pasted(self.output)}")
