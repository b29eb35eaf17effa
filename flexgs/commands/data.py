"""The commands around captures: flexgs data list | get | check | make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flexgs.errors import UserError, pasted


@dataclass
class DataList:
    """Show the captures that can be downloaded, and which of them are in DATA_ROOT."""

    data_root: Path = Path("data")

    def __call__(self) -> None:
        """Print a table of the catalogue, the datasets' licences and other captures in DATA_ROOT."""
        from rich import box
        from rich.table import Table

        from flexgs.datasets.catalog import CATALOG, DATASETS, PROTOCOLS, is_capture
        from flexgs.report.table import print_table

        table = Table("capture", "dataset", "camera", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("images", "pixels", "memory", *(f"{protocol} 1/" for protocol in PROTOCOLS)):
            table.add_column(heading, justify="right")
        table.add_column("archive")
        table.add_column("here")
        for known in CATALOG.values():
            memory, archive = known.memory(known.factor), known.archive
            table.add_row(known.name, known.dataset, DATASETS[known.dataset].camera, str(known.images or "?"),
                          "x".join(map(str, known.size or "?")), f"{memory / 1e9:.1f} GB" if memory else "?",
                          *(str(known.factor_of(protocol)) for protocol in PROTOCOLS),
                          archive.file + (f", {archive.gigabytes:g} GB" if archive.gigabytes else ""),
                          str(known.find(self.data_root) or ""))
        print_table(table)
        print("pixels, and memory for decoded images: at the field's factor; ?: unknown")
        for dataset in DATASETS.values():
            print(f"{dataset.title}: {dataset.page} (licence: {dataset.licence})")
        if self.data_root.is_dir() and (others := [path for path in self.data_root.iterdir()
                                                   if is_capture(path) and path.name not in CATALOG]):
            print(f"also in {self.data_root}: {', '.join(sorted(path.name for path in others))}")


@dataclass
class DataGet:
    """Download captures to DATA_ROOT/<name>; the same command continues what was interrupted."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Captures or datasets, by the names that `flexgs data list` prints."""
    data_root: Path = Path("data")

    def __call__(self) -> None:
        """Download what is missing and print the folders; UserError for a name that is not known."""
        from flexgs.datasets.catalog import CATALOG, DATASETS, members
        from flexgs.datasets.download import get

        if not self.names:
            raise UserError("data get: found no name, expected captures or datasets: "
                            "`flexgs data list` has them")
        if unknown := [name for name in self.names if name not in CATALOG and name not in DATASETS]:
            raise UserError(f"data get {' '.join(unknown)}: found no such capture or dataset; expected of "
                            f"{', '.join([*DATASETS, *CATALOG])}")
        names = dict.fromkeys(one for name in self.names
                              for one in (members(name) if name in DATASETS else [name]))
        for path in get([CATALOG[name] for name in names], self.data_root):
            print(pasted(path))


@dataclass
class DataCheck:
    """Say what captures hold, what is doubtful, and whether cameras and images of all sizes are complete."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    model: str | None = None
    """Which of several COLMAP models, such as 1 for sparse/1."""

    def __call__(self) -> None:
        """Print a line per finding; UserError if a capture is not whole."""
        from flexgs.datasets.check import check_capture

        if not self.folders:
            raise UserError("data check: found no folder, expected captures")
        broken = []
        for folder in self.folders:
            found = check_capture(folder, self.model)
            lines = [found.holds] if found.holds else []
            lines += [f"doubt: {doubt}" for doubt in found.doubts] + (found.wrong or ["whole"])
            print("\n".join(line if line.startswith(str(folder)) else f"{folder}: {line}" for line in lines))
            broken += [str(folder)] if found.wrong else []
        if broken:
            raise UserError(f"data check: {', '.join(broken)} "
                            f"{'is' if len(broken) == 1 else 'are'} not whole")


@dataclass
class DataMake:
    """Make the built-in synthetic captures."""

    folder: tyro.conf.Positional[Path] = Path("data/synthetic")

    def __call__(self) -> None:
        """Make the captures that are not there and print the folders of all."""
        from flexgs.demo.synthetic import ensure_synthetic

        print("\n".join(map(pasted, ensure_synthetic(self.folder))))


@dataclass
class Data:
    """List, get and check the usual captures of the literature; make the built-in synthetic ones."""

    action: tyro.conf.OmitArgPrefixes[
        Annotated[DataList, tyro.conf.subcommand("list", prefix_name=False)]
        | Annotated[DataGet, tyro.conf.subcommand("get", prefix_name=False)]
        | Annotated[DataCheck, tyro.conf.subcommand("check", prefix_name=False)]
        | Annotated[DataMake, tyro.conf.subcommand("make", prefix_name=False)]]

    def __call__(self) -> None:
        """Run the subcommand."""
        self.action()
