"""Merging: kept Gaussians widened so that they also stand for the dropped ones nearest to them."""

from itertools import permutations

import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from flexgs.model.merge_tree import MergeTree
from flexgs.splats import Splats, rotation_matrices


def merged(splats: Splats, weight: Tensor, k: int) -> Splats:
    """Merge every Gaussian after the first k into the nearest of the first k, by matching moments.

    Mean, covariance and base colour are those of the mixture with weights [N] >= 0. The opacity preserves the
    sum of opacity times area, the area being the product of the two larger standard deviations. The axes of
    the result are numbered and signed as in the Gaussian kept, so that it changes little. Harmonics of higher
    degree are kept. Computed in float64 on the CPU, so that all workers agree. Returns k Gaussians.
    """
    s = splats.detach().to("cpu").map(torch.Tensor.double)
    weight = weight.detach().cpu().double().clamp(min=1e-200)
    owner = torch.from_numpy(cKDTree(s.means[:k].numpy()).query(s.means.numpy())[1])
    owner[:k] = torch.arange(k)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(k, *values.shape[1:], dtype=torch.float64).index_add_(0, owner, values)

    def mean(values: Tensor) -> Tensor:
        shape = -1, *[1] * (values.dim() - 1)
        return total(values * weight.view(shape)) / total(weight).view(shape)

    rotations = torch.from_numpy(Rotation.from_quat(s.quats.numpy(), scalar_first=True).as_matrix())
    axes = rotations * s.scales.exp()[:, None, :]
    means = mean(s.means)
    away = s.means - means[owner]
    covariances = mean(axes @ axes.mT + away[:, :, None] * away[:, None, :])
    scales, quats = _along(s[:k], *torch.linalg.eigh(covariances))
    opacities = (total(torch.sigmoid(s.opacities) * _area(s.scales)) / _area(scales)).clamp(0.02, 0.98)
    new = s.changed(means=means, quats=quats, scales=scales, opacities=torch.logit(opacities),
                    sh0=mean(s.sh0), shN=s.shN[:k])
    return new.map(torch.Tensor.float).to(splats.means.device)


def merged_by(tree: MergeTree, splats: Splats, k: int) -> Splats:
    """Return the k Gaussians of a tree's cut, each in the place of the one of the first k that it stands for.

    That is for splats in the order of the tree. The axes are numbered and signed as in merged().
    """
    kept = torch.tensor(tree.kept(k))
    rest = torch.ones(k, dtype=torch.bool).index_fill_(0, kept[kept < k], False)
    kept[kept >= k] = rest.nonzero()[:, 0]  # of equal Gaussians the tree may keep any
    cut = tree.cut(k)[kept.argsort()]
    mine, first = (s.detach().to("cpu").map(torch.Tensor.double) for s in (cut, splats[:k]))
    scales, quats = _along(first, (2 * mine.scales).exp(), rotation_matrices(mine.quats))
    return cut.changed(scales=scales.to(cut.scales), quats=quats.to(cut.quats))


def _along(like: Splats, variances: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-scales [k, 3] and quaternions [k, 4] of variances [k, 3] along vectors [k, 3, 3].

    Axes, signs and lengths are the nearest ones to those of the k Gaussians `like`.
    """
    variances, vectors = _in_order_of(rotation_matrices(like.quats), variances, vectors)
    scales = variances.clamp(min=1e-14 * variances.amax(1, keepdim=True).clamp(min=1e-200)).log() / 2
    length = like.quats.norm(dim=1, keepdim=True)
    quats = torch.from_numpy(Rotation.from_matrix(vectors.numpy()).as_quat(scalar_first=True)) * length
    # q and -q are the same rotation: take the nearer one.
    return scales, torch.where((quats * like.quats).sum(1, keepdim=True) < 0, -quats, quats)


def _area(scales: Tensor) -> Tensor:
    return (scales.sum(1) - scales.amin(1)).exp()


def _in_order_of(rotations: Tensor, variances: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Number and sign eigenvalues [k, 3] and eigenvectors [k, 3, 3] as rotations [k, 3, 3] has its axes.

    The result is right-handed.
    """
    overlap = (vectors.mT @ rotations).abs()
    orders = torch.tensor(list(permutations(range(3))))
    fit = overlap[:, orders, torch.arange(3)].sum(-1)  # [k, 6]
    order = orders[fit.argmax(1)]
    variances = torch.gather(variances, 1, order)
    vectors = torch.gather(vectors, 2, order[:, None, :].expand(-1, 3, 3))
    vectors = vectors * torch.where((vectors * rotations).sum(1) < 0, -1.0, 1.0)[:, None, :]
    vectors[:, :, 2] *= torch.linalg.det(vectors).sign()[:, None]
    return variances, vectors
