"""What a cut is stored as: sizes, round trips, broken files."""

import typing
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_splats

from flexgs import config as cfg
from flexgs.config import Config, EvaluationConfig
from flexgs.errors import UserError
from flexgs.evaluate import evaluate
from flexgs.formats import FORMATS, as_stored, latents, vq
from flexgs.formats.arrays import read_arrays, write_arrays
from flexgs.image.quality import psnr
from flexgs.model.elastic import ElasticModel
from flexgs.model.transform import Transform
from flexgs.raster import render
from flexgs.splats import Splats, rotation_matrices


def covariances(splats: Splats) -> torch.Tensor:
    half = rotation_matrices(splats.quats) * splats.scales.exp()[:, None, :]
    return half @ half.mT


def write_vq(splats, path, codebook=vq.CODEBOOK):
    vq.write(splats.arrays(), path, np.linspace(0, 1, len(splats)), codebook)


def read_vq(path):
    return Splats.of(vq.read(path))


def write_latents(splats, path):
    latents.write(splats.arrays(), path)


def read_latents(path):
    return Splats.of(latents.read(path))


def morton_order(means):
    return torch.from_numpy(vq.morton_order(means.numpy()))


ENCODERS = {"vq": (write_vq, read_vq), "latents": (write_latents, read_latents)}


def test_settings_and_formats_agree():
    assert typing.get_args(typing.get_type_hints(EvaluationConfig)["format"]) == tuple(FORMATS)
    with pytest.raises(UserError, match=r"format zip: unknown; expected one of ply, .*latents"):
        as_stored(random_splats(3), "zip", [])


def test_the_page_of_formats_has_a_row_for_each():
    """Key, suffix and what is lost; also what is not a file of Gaussians alone."""
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert {(row[0].strip("|` "), row[1].strip("` ")) for row in rows if len(row) == 9} == \
        {(key, chosen.suffix) for key, chosen in FORMATS.items()}
    assert all(word in page for word in (".fgs", ".html", "lod-meta.json"))


@pytest.mark.parametrize("name", ["ply", *ENCODERS])
def test_bytes_are_those_of_the_file_and_pictures_stay(scene, splats, tmp_path, name):
    """A file that the user writes has the size that is reported, and shows what was measured."""
    chosen, path = FORMATS[name], tmp_path / f"x{FORMATS[name].suffix}"
    stored = as_stored(splats, name, scene.train)
    chosen.write(splats, path, scene.train)
    assert path.stat().st_size == stored.bytes
    assert len(stored.splats) == len(splats) and stored.splats.sh_degree == splats.sh_degree
    assert stored.seconds > 0 or name == "ply"
    again = chosen.read(path)
    for view in scene.test[:2]:
        before, measured, read = (render(s, view.camera).image for s in (splats, stored.splats, again))
        torch.testing.assert_close(measured, read, atol=1e-5, rtol=0)  # PLY: unit quaternions
        assert psnr(measured, before) > 38


@pytest.mark.parametrize("n", [1, 2, 300])
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_vq_round_trip_without_clusters(tmp_path, n, degree):
    splats = random_splats(n, degree)
    write_vq(splats, tmp_path / "x.npz")
    again, expected = read_vq(tmp_path / "x.npz"), splats[morton_order(splats.means)]
    assert torch.equal(again.means, expected.means.half().float())
    for name in ("opacities", "sh0", "shN"):  # half a step of 8 bits
        found, wanted = (getattr(s, name).reshape(n, -1) for s in (again, expected))
        assert bool(((found - wanted).abs() <= (wanted.amax(0) - wanted.amin(0)) / 509 + 1e-5).all()), name
    was, now = covariances(expected), covariances(again)
    assert float((now - was).norm(dim=(1, 2)).div(was.norm(dim=(1, 2))).max()) < 0.05


def test_vq_clusters_what_does_not_fit(tmp_path):
    splats = random_splats(300, 1)
    write_vq(splats, tmp_path / "x.npz", codebook=32)
    arrays = read_arrays(tmp_path / "x.npz", vq.KIND, vq.LAYOUT)
    assert (arrays["colours"].shape[1], arrays["shapes"].shape[1]) == (32 + 30, 32 + 90)
    again, expected = read_vq(tmp_path / "x.npz"), splats[morton_order(splats.means)]
    assert len(again) == 300 and torch.equal(again.means, expected.means.half().float())
    assert len(again.sh0.unique(dim=0)) <= 62
    error = (again.sh0 - expected.sh0).norm(dim=1)
    most = torch.linspace(0, 1, 300)[morton_order(splats.means)].argsort(descending=True)
    # the most sensitive keep their own
    assert float(error[most[:30]].max()) < 0.02 < float(error[most[30:]].mean())


def test_a_high_weight_gets_a_nearer_entry():
    """Two groups alike but for their weight share a codebook."""
    half = np.random.default_rng(0).normal(size=(400, 3))
    values = np.concatenate([half, half + 20])
    for heavy in (0, 1):
        weight = np.where(np.arange(800) // 400 == heavy, 100.0, 1.0)
        index, entries = vq.clustered(values, weight, 64, own=0)
        error = np.linalg.norm(values - entries[index], axis=1).reshape(2, 400).mean(1)
        assert len(entries) == 64 and error[heavy] < 0.8 * error[1 - heavy]


def test_what_no_view_sees_is_clustered_all_the_same():
    values = np.random.default_rng(0).normal(size=(200, 3))
    for weight in (np.zeros(200), np.where(np.arange(200) < 5, 1.0, 0.0)):
        index, entries = vq.clustered(values, weight, 64, own=0.1)
        assert len(entries) == 84 and index.max() < 84


def test_a_position_beyond_float16_stays_finite(tmp_path):
    splats = random_splats(5)
    splats.means[2, 0] = -1e6
    write_vq(splats, tmp_path / "x.npz")
    assert float(read_vq(tmp_path / "x.npz").means.min()) == -65504


def test_morton_order_keeps_neighbours_together():
    g = torch.Generator().manual_seed(0)
    means = torch.rand(2000, 3, generator=g)
    order = morton_order(means)
    assert torch.equal(order.sort().values, torch.arange(2000))
    assert (float(means[order].diff(dim=0).norm(dim=1).mean())
            < 0.2 * float(means.diff(dim=0).norm(dim=1).mean()))
    corners = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert morton_order(corners).tolist() == [4, 1, 2, 3, 0]


@pytest.mark.parametrize("n", [1, 2, 300])
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_latents_round_trip(tmp_path, n, degree):
    splats = random_splats(n, degree)
    write_latents(splats, tmp_path / "x.npz")
    again = read_latents(tmp_path / "x.npz")
    for name in ("means", "scales", "sh0"):
        assert torch.equal(getattr(again, name), getattr(splats, name))
    spread = float((splats.opacities - splats.opacities.mean()).abs().max())
    torch.testing.assert_close(again.opacities, splats.opacities, atol=spread / 253 + 1e-6, rtol=0)
    assert float((rotation_matrices(again.quats) - rotation_matrices(splats.quats)).abs().max()) < 0.05
    assert again.shN.shape == splats.shN.shape
    if 0 < degree < 2:  # 9 values in 9 latents; of degree 3 only what 16 directions can hold
        torch.testing.assert_close(again.shN, splats.shN, atol=0.02, rtol=0)


def test_latents_are_the_best_linear_ones():
    """As much is lost as the singular values left out say (Eckart and Young 1936), and little by rounding."""
    values = np.random.default_rng(0).normal(size=(500, 24)) * np.linspace(1, 0.01, 24)
    integers, decoder, bias = latents.encode(values, 16)
    assert integers.dtype == np.int8 and integers.shape == (16, 500) and np.abs(integers).max() == 127
    lost = float(((latents.decode(integers, decoder, bias) - values) ** 2).sum())
    assert np.square(np.linalg.svd(values - values.mean(0))[1][16:]).sum() < lost
    step = np.linalg.norm(decoder, axis=1).max()
    assert (lost < np.square(np.linalg.svd(values - values.mean(0))[1][16:]).sum()
            + 1.1 * 16 * 500 * step**2 / 12)


@pytest.mark.parametrize("name", ENCODERS)
def test_equal_splats_make_equal_bytes(tmp_path, name):
    splats = random_splats(300)
    for copy in "ab":
        ENCODERS[name][0](splats, tmp_path / copy, *([32] if name == "vq" else []))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ENCODERS)
def test_broken_file_is_a_user_error(tmp_path, name):
    write, read = ENCODERS[name]
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match=r"x\.npz: no such file"):
        read(path)
    write(random_splats(50), path)
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    middle = len(whole) // 2
    inside = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1:]
    for broken in (b"", whole[:3], whole[:100], whole[:middle], whole[:-1], flipped, inside,
                   b"ply\n" + whole[4:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"x\.npz: not a readable {name} file") as e:
            read(path)
        assert "\n" not in str(e.value)
    for kind in ("vq 0", "latents 2"):  # another version
        write_arrays(path, kind, {})
        with pytest.raises(UserError, match=rf"found a file of kind '{kind}', expected '{name} 1'"):
            read(path)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_array_is_checked(tmp_path, name):
    """Missing, of another shape or type, none, not finite, or beyond the codebook."""
    write, read = ENCODERS[name]
    module, path = {"vq": vq, "latents": latents}[name], tmp_path / "x.npz"
    write(random_splats(50), path)
    good = read_arrays(path, module.KIND, module.LAYOUT)

    def refuses(words: str, **changed) -> None:
        write_arrays(path, module.KIND, {k: v for k, v in {**good, **changed}.items() if v is not None})
        with pytest.raises(UserError, match=rf"x\.npz: .*{words}"):
            read(path)

    for array in good:
        refuses(array, **{array: None})
        refuses(array, **{array: good[array].astype(np.float64)})
        refuses(array, **{array: good[array][None]})
        if good[array].ndim > 1 or name == "vq":
            refuses("found", **{array: good[array][..., :-1]})
    refuses("NaN or infinite means", means=np.full_like(good["means"], np.nan))
    if name == "vq":
        refuses("found shape 65535, expected below", shape=np.full_like(good["shape"], 65535))
        refuses("found 11 values per colour", colours=good["colours"][1:],
                colours_range=good["colours_range"][1:])
        none = {a: good[a][..., :0] for a in ("means", "scalars", "colour", "shape")}
    else:
        refuses("expected 0, 9, 24 or 45", shN_decoder=good["shN_decoder"][:, 1:],
                shN_bias=good["shN_bias"][1:])
        none = {a: good[a][..., :0] for a in good if good[a].shape[-1] == 50}
    refuses("found no Gaussians", **none)


@pytest.mark.parametrize(("name", "array", "kind", "layout"),
                         [("vq", "colours_range", vq.KIND, vq.LAYOUT),
                          ("latents", "shN_decoder", latents.KIND, latents.LAYOUT)])
def test_numbers_that_overflow_are_refused_in_one_line(tmp_path, name, array, kind, layout, recwarn):
    write, read = ENCODERS[name]
    write(random_splats(50, 1), tmp_path / "x.npz")
    arrays = read_arrays(tmp_path / "x.npz", kind, layout)
    write_arrays(tmp_path / "x.npz", kind, {**arrays, array: np.full_like(arrays[array], 3e38)})
    with pytest.raises(UserError, match="found NaN or infinite"):
        read(tmp_path / "x.npz")
    assert not recwarn.list


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path):
    """Its table of contents claims more than DEFLATE can pack; nothing of that size is allocated."""
    path = tmp_path / "x.npz"
    write_latents(random_splats(50), path)
    with zipfile.ZipFile(path) as packed:
        size = packed.getinfo("means.npy").file_size
    data = path.read_bytes()
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"means.npy"))
    at = data.index(size.to_bytes(4, "little"), entry)
    path.write_bytes(data[:at] + (2**31).to_bytes(4, "little") + data[at + 4:])
    with pytest.raises(UserError, match=r"not a readable latents file \(it claims to hold 2147"):
        latents.read(path)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_small_file_of_many_zeros_is_refused(tmp_path, name):
    """A hundred bytes of it become a hundred thousand: no positions pack like that."""
    write, read = ENCODERS[name]
    path, module = tmp_path / "x.npz", {"vq": vq, "latents": latents}[name]
    write(random_splats(50), path)
    n = 2_000_000
    zeros = {key: np.zeros((*a.shape[:-1], n), a.dtype) if a.shape[-1] == 50 else a
             for key, a in read_arrays(path, module.KIND, module.LAYOUT).items()}
    write_arrays(path, module.KIND, zeros)
    with pytest.raises(UserError, match="it claims to hold"):
        read(path)


@pytest.mark.parametrize("name", FORMATS)
def test_evaluate_measures_what_is_stored(scene, name):
    model = ElasticModel(random_splats(200), Transform(), Config(transform=cfg.TransformConfig("none")))
    measured = evaluate(model, scene, EvaluationConfig((0.5,), format=name, lpips=()), (0.0, 0.0, 0.0))
    stored, row = as_stored(model.cut(0.5), name, scene.train), measured["ratios"]["0.5"]
    assert measured["protocol"]["mb"] == FORMATS[name].about
    assert (row["splats"], row["mb"]) == (100, round(stored.bytes / 1e6, 4)) and row["cut_seconds"] >= 0
    target = [view.image() / 255 for view in scene.test]
    images = [render(stored.splats, view.camera).image.clamp(0, 1) for view in scene.test]
    assert row["psnr"] == pytest.approx(np.mean([psnr(a, b) for a, b in zip(images, target, strict=True)]),
                                        abs=1e-4)


@pytest.mark.parametrize("far", [1e7, 1e20])
def test_a_far_gaussian_does_not_hide_that_few_others_collapse(far, tmp_path):
    """Compressed PLY counts positions in 1/2048 of the box around 256 of them."""
    splats = random_splats(40)
    means = splats.means.clone()
    means[0] = far
    with pytest.raises(UserError, match="cannot hold these Gaussians"):
        FORMATS["compressed_ply"].write(splats.changed(means=means), tmp_path / "a.compressed.ply")
    assert not list(tmp_path.iterdir())
