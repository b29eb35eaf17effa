"""COLMAP's steps from photographs to camera poses: features, matches, mapping.

Everything that is found is kept in a database, and what is in it is not computed again. The same photographs
give the same reconstruction with any number of cores: what adds up in the order in which COLMAP's threads
come has one thread (ONE). For mapping a second one saves no time.
"""

import itertools
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexgs.errors import UserError
from flexgs.pool import get_num_threads
from flexgs.scene.pycolmap_library import library
from flexgs.sfm.options import FEWEST, CaptureOptions
from flexgs.sfm.progress import Phase
from flexgs.urls import first_line

if TYPE_CHECKING:
    import pycolmap

ONE = 1
"""Threads of the vocabulary and of mapping; features and matches have all cores."""
LARGEST = 1600
"""Most pixels along a side of the images that features are looked for in."""
BATCH = 8
"""Photographs per call of COLMAP while features are found; pairs are matched in tiles of BATCH x BATCH."""
OVERLAP = 10
"""Each photograph is matched to so many that follow it by name, and to those 16, 32, ... after it."""
NEIGHBOURS = 20
"""Each photograph is matched to so many that look alike."""
COMPARED = 1024
"""Likeness is that of so many features of each photograph, the largest ones."""
WORDS, SAMPLES = 2048, 80_000
"""Size of the vocabulary that likeness is measured with, and the number of descriptors it is made of."""
FEW_INLIERS, FEW_INLIERS_RATIO = 15, 0.1
"""Matches that a photograph needs in the second pass, half of what COLMAP asks for in the first, and what
part of all its matches they are."""
SHORTEST = 0.3
"""Shortest focal length in image widths, a field of view of 118 degrees: what is shorter, but for fisheye
lenses, is a mistake that few matches lead to."""
MOST_ERROR = 1.5
"""The second pass counts unless it raises the mean reprojection error by more than this factor."""


@dataclass
class Mapped:
    """What COLMAP has found."""

    models: list["pycolmap.Reconstruction"]
    """Sub-models, the one with the most photographs first."""
    weak: list[str]
    """Photographs that only the second pass gave a pose."""


class Mapper:
    """COLMAP on the photographs of a capture, with its database in the capture's folder."""

    def __init__(self, capture: Path, options: CaptureOptions):
        self.images, self.database, self.options = capture / "images", capture / "database.db", options
        self.masks, self.pairs = capture / "masks", capture / "pairs.txt"
        self.colmap: Any = library()
        try:
            self.colmap.Database.open(self.database).close()
        except RuntimeError as e:
            raise UserError(f"{self.database}: found no database of COLMAP ({first_line(e)}); remove it, and "
                            "the same command begins anew") from None

    def add(self, cameras: list[list[str]]) -> None:
        """Add the photographs to the database; those of each list share a camera, unless each has its own."""
        known = set(self._names())
        mode = self.colmap.CameraMode
        for names in cameras:
            if new := [name for name in names if name not in known]:
                self.colmap.import_images(
                    self.database, self.images, image_names=new, options=self._reader(),
                    camera_mode=mode.PER_IMAGE if self.options.each_camera else mode.SINGLE)
        if lost := sorted(set(itertools.chain(*cameras)) - set(self._names())):
            raise UserError(f"{self.images / lost[0]}: COLMAP cannot read it; remove the photograph that it "
                            "was made from, or convert it to JPEG")

    def find_features(self) -> None:
        """Find the features of the photographs that have none yet."""
        options = self.colmap.FeatureExtractionOptions()
        options.max_image_size, options.num_threads = LARGEST, get_num_threads()
        options.sift.max_num_features = self.options.features
        names = sorted(self._names())
        masked = {name for name in names if (self.masks / f"{name}.png").exists()}
        phase = Phase("features", len(names), "photographs")
        for i in range(0, len(names), BATCH):
            reader, batch = self._reader(), names[i:i + BATCH]
            for some in ([name for name in batch if name not in masked], masked.intersection(batch)):
                if some:
                    self.colmap.extract_features(
                        self.database, self.images, image_names=sorted(some), reader_options=reader,
                        extraction_options=options, device=self.colmap.Device.cpu)
                reader.mask_path = self.masks  # COLMAP takes no photograph without a mask from now on
            phase.done(min(i + BATCH, len(names)))
        with closing(sqlite3.connect(self.database)) as rows:
            counts = [n for n, in rows.execute("SELECT rows FROM keypoints ORDER BY rows")]
        if len(counts) < len(names):
            raise UserError(f"{self.images}: COLMAP found no features in {len(names) - len(counts)} of "
                            f"{len(names)} photographs, and did not say why; remove {self.database}, and the "
                            "same command looks again")
        phase.end(f", a median of {counts[len(counts) // 2]:,} features each")

    def match(self) -> int:
        """Match the pairs of photographs that have not been matched, and return how many pairs fit."""
        options, geometry = self.colmap.FeatureMatchingOptions(), self.colmap.TwoViewGeometryOptions()
        options.num_threads, geometry.ransac.random_seed = get_num_threads(), self.options.seed
        listed = self.colmap.ImportedPairingOptions()
        listed.match_list_path = self.pairs
        with closing(self.colmap.Database.open(self.database)) as database:
            names = {image.image_id: image.name for image in database.read_all_images()}
            ids = sorted(names, key=names.__getitem__)
            everything = len(ids) <= self.options.exhaustive
            wanted = set(itertools.combinations(ids, 2)) if everything else self._likely(ids, database)
            matched = {self.colmap.pair_id_to_image_pair(pair) for pair in database.read_all_matches()[0]}
        place = {image: i for i, image in enumerate(ids)}
        tiles: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for a, b in sorted(wanted - matched - {(b, a) for a, b in matched}):
            tiles.setdefault((place[a] // BATCH, place[b] // BATCH), []).append((a, b))
        phase = Phase("matches", sum(map(len, tiles.values())), "pairs")
        done = 0
        for tile in tiles.values():
            self.pairs.write_text("".join(f"{names[a]} {names[b]}\n" for a, b in tile))
            self.colmap.match_image_pairs(self.database, options, listed, geometry,
                                          device=self.colmap.Device.cpu)
            done += len(tile)
            phase.done(done)
        self.pairs.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.database)) as rows:
            fit, = rows.execute("SELECT COUNT(*) FROM two_view_geometries WHERE rows > 0").fetchone()
        phase.end(f"{'' if everything else ' that follow each other or look alike'}, {fit:,} fit")
        return fit

    def map(self, out: Path) -> Mapped:
        """Compute poses and points, and write the sub-models to out/0, out/1, ..., the largest first.

        Photographs that the largest lacks are tried once more, with half the matches that COLMAP asks for.
        """
        names = self._names()
        options = self.colmap.IncrementalPipelineOptions()
        options.random_seed, options.num_threads = self.options.seed, ONE
        if "FISHEYE" not in self.options.camera_model:
            options.min_focal_length_ratio = SHORTEST
        options.min_model_size = min(options.min_model_size, max(FEWEST, len(names) // 4))
        phase = Phase("poses", len(names), "photographs")
        counter = itertools.count(3)  # the first two come as a pair
        found = self.colmap.incremental_mapping(
            self.database, self.images, out, options,
            next_image_callback=lambda: phase.done(min(next(counter), len(names))))
        models = sorted((model for model in found.values() if model.num_reg_images() >= FEWEST),
                        key=lambda model: -model.num_reg_images())
        weak: list[str] = []
        if models and models[0].num_reg_images() < len(names):
            models[0], weak = self._second_pass(models[0], options, out)
        for folder in list(out.iterdir()):
            shutil.rmtree(folder)
        for i, model in enumerate(models):
            (out / str(i)).mkdir()
            model.write_binary(out / str(i))
        phase.end(f", {models[0].num_reg_images() if models else 0} found")
        return Mapped(models, weak)

    def _second_pass(self, model: "pycolmap.Reconstruction", options: Any,
                     out: Path) -> tuple["pycolmap.Reconstruction", list[str]]:
        """Return the model with the photographs that fit with few matches, and the names of these."""
        (first := out / "first").mkdir()
        (second := out / "second").mkdir()
        model.write_binary(first)
        options.mapper.abs_pose_min_num_inliers = FEW_INLIERS
        options.mapper.abs_pose_min_inlier_ratio = FEW_INLIERS_RATIO
        found = self.colmap.incremental_mapping(self.database, self.images, second, options, input_path=first)
        larger = max(found.values(), key=lambda m: m.num_reg_images(), default=None)
        if larger is None or not posed(model) < posed(larger):
            return model, []
        if larger.compute_mean_reprojection_error() > MOST_ERROR * model.compute_mean_reprojection_error():
            return model, []
        return larger, sorted(posed(larger) - posed(model))

    def _likely(self, ids: list[int], database: "pycolmap.Database") -> set[tuple[int, int]]:
        """List the pairs that follow each other by name or look alike, by a vocabulary made of them all."""
        colmap = self.colmap
        steps = [*range(1, OVERLAP + 1), *(2**k for k in range(4, 32) if OVERLAP < 2**k < len(ids))]
        pairs = {(a, ids[i + step]) for i, a in enumerate(ids) for step in steps if i + step < len(ids)}
        described = {i: database.read_descriptors(i) for i in ids}
        sample = np.concatenate([d.data[:max(1, SAMPLES // len(ids))] for d in described.values()])
        if len(sample) < WORDS:
            return pairs
        options = colmap.VisualIndex.BuildOptions()
        options.num_visual_words, options.num_rounds, options.num_threads = WORDS, 1, ONE
        colmap.set_random_seed(self.options.seed)
        index = colmap.VisualIndex.create(sample.shape[1], sample.shape[1] // 2)
        index.build(options, colmap.FeatureDescriptorsFloat(type=described[ids[0]].type,
                                                            data=sample.astype(np.float32)))
        index.write(vocabulary := self.pairs.with_name("vocabulary.bin"))
        alike = colmap.VocabTreePairingOptions()
        alike.vocab_tree_path, alike.num_images, alike.max_num_features = vocabulary, NEIGHBOURS, COMPARED
        alike.num_threads = ONE
        found = colmap.VocabTreePairGenerator(alike, database).all_pairs()
        vocabulary.unlink()
        place = {image: i for i, image in enumerate(ids)}
        return pairs | {(a, b) if place[a] < place[b] else (b, a) for a, b in found if a != b}

    def _reader(self) -> Any:
        options = self.colmap.ImageReaderOptions()
        options.camera_model = self.options.camera_model
        return options

    def _names(self) -> list[str]:
        with closing(self.colmap.Database.open(self.database)) as database:
            return [image.name for image in database.read_all_images()]


def posed(model: "pycolmap.Reconstruction") -> set[str]:
    """Return the names of the photographs that a model gives a pose."""
    return {image.name for image in model.images.values() if image.has_pose}
