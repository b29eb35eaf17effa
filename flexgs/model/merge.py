"""Merging: what the Gaussians that stay would look like if they stood for those that do not, too."""

from itertools import permutations

import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from flexgs.splats import Splats


def merged(splats: Splats, weight: Tensor, k: int) -> Splats:
    """The first k Gaussians, each the moment-matched sum of itself and of the others that are nearest to it.

    Mean, covariance and constant colour are those of the mixture with weight [N] >= 0; the opacity keeps the
    sum of opacity times area, an area being the product of the two larger standard deviations. Axes are
    numbered as in the one that stays, so that the way from one to the other is short. Other harmonics stay.
    In float64 on the CPU, the same on every worker.
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
    variances, vectors = _in_order_of(rotations[:k], *torch.linalg.eigh(covariances))
    scales = variances.clamp(min=1e-14 * variances.amax(1, keepdim=True).clamp(min=1e-200)).log() / 2
    length = s.quats[:k].norm(dim=1, keepdim=True)
    quats = torch.from_numpy(Rotation.from_matrix(vectors.numpy()).as_quat(scalar_first=True)) * length
    # q and -q are the same rotation
    quats = torch.where((quats * s.quats[:k]).sum(1, keepdim=True) < 0, -quats, quats)
    opacities = (total(torch.sigmoid(s.opacities) * _area(s.scales)) / _area(scales)).clamp(0.02, 0.98)
    new = s.changed(means=means, quats=quats, scales=scales, opacities=torch.logit(opacities),
                    sh0=mean(s.sh0), shN=s.shN[:k])
    return new.map(torch.Tensor.float).to(splats.means.device)


def _area(scales: Tensor) -> Tensor:
    return (scales.sum(1) - scales.amin(1)).exp()


def _in_order_of(rotations: Tensor, variances: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [k, 3] and eigenvectors [k, 3, 3] with axes numbered and signed as in rotations [k, 3, 3];
    right-handed."""
    overlap = (vectors.mT @ rotations).abs()
    orders = torch.tensor(list(permutations(range(3))))
    fit = overlap[:, orders, torch.arange(3)].sum(-1)  # [k, 6]
    order = orders[fit.argmax(1)]
    variances = torch.gather(variances, 1, order)
    vectors = torch.gather(vectors, 2, order[:, None, :].expand(-1, 3, 3))
    vectors = vectors * torch.where((vectors * rotations).sum(1) < 0, -1.0, 1.0)[:, None, :]
    vectors[:, :, 2] *= torch.linalg.det(vectors).sign()[:, None]
    return variances, vectors
