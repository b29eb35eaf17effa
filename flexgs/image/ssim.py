"""L1 + SSIM and the gradient of the sum on the CPU, fused: two numba kernels over image rows.

A row is a flat vector of W * 3 floats, so that the horizontal taps of one channel lie 3 floats apart and the
loops vectorise without regard to channels. A row is computed in the same way in any range of rows, so results
are bitwise equal for any number of threads. All buffers belong to one call, so that several losses can wait
for their backward pass at once.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexgs.pool import run_ranges

FASTMATH = {"contract", "nsz", "arcp", "afn", "reassoc"}
kernel = njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
helper = njit(nogil=True, fastmath=FASTMATH, error_model="numpy")

f32, u64 = np.float32, np.uint64
ZERO, ONE, TWO = f32(0), f32(1), f32(2)
REACH = u64(5)  # rows above and below a pixel in its window
ROWS = u64(11)  # taps of the window
EDGE = u64(16)  # zeros left and right of a row: 5 pixels of 3 floats, and one more to be even
TWO_EDGES = u64(32)
_taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
_taps /= _taps.sum()
W0, W1, W2, W3, W4, W5 = (f32(_taps[5 + t]) for t in range(6))
C1, C2 = f32(0.01**2), f32(0.03**2)


@helper
def blur_row(src, s, dst, d, n):
    """Blur the row src[s : s + n], which has zeros on both sides, along x into dst[d : d + n]."""
    for i in range(n):
        c = s + i
        dst[d + i] = (
            W0 * src[c]
            + W1 * (src[c - u64(3)] + src[c + u64(3)])
            + W2 * (src[c - u64(6)] + src[c + u64(6)])
            + W3 * (src[c - u64(9)] + src[c + u64(9)])
            + W4 * (src[c - u64(12)] + src[c + u64(12)])
            + W5 * (src[c - u64(15)] + src[c + u64(15)])
        )


@helper
def blur_column(ring, row, field, n, fields, dst):
    """Blur the rows around `row` of one field in the ring buffer along y into dst[:n].

    In three passes: a loop over more arrays than LLVM checks for overlap would not be vectorised.
    """
    stride = fields * n
    base = field * n
    # row + 11 - t is row - t without going below 0
    c = (row % ROWS) * stride + base
    a1, b1 = ((row + u64(10)) % ROWS) * stride + base, ((row + u64(1)) % ROWS) * stride + base
    a2, b2 = ((row + u64(9)) % ROWS) * stride + base, ((row + u64(2)) % ROWS) * stride + base
    a3, b3 = ((row + u64(8)) % ROWS) * stride + base, ((row + u64(3)) % ROWS) * stride + base
    a4, b4 = ((row + u64(7)) % ROWS) * stride + base, ((row + u64(4)) % ROWS) * stride + base
    a5, b5 = ((row + u64(6)) % ROWS) * stride + base, ((row + u64(5)) % ROWS) * stride + base
    for i in range(n):
        dst[i] = W0 * ring[c + i] + W1 * (ring[a1 + i] + ring[b1 + i])
    for i in range(n):
        dst[i] += W2 * (ring[a2 + i] + ring[b2 + i]) + W3 * (ring[a3 + i] + ring[b3 + i])
    for i in range(n):
        dst[i] += W4 * (ring[a4 + i] + ring[b4 + i]) + W5 * (ring[a5 + i] + ring[b5 + i])


@kernel
def loss_fwd(lo, hi, image, target, height, n, sums, slopes, want_slopes):
    """Write (sum |a - b|, sum SSIM) of rows lo..hi to sums [H, 2]: a is the image, b the target.

    Writes d sum SSIM / d (blurred a, blurred a a + b b, blurred a b) to slopes [3, H * n] if wanted. Four
    blurred fields are enough, since SSIM depends on the sum of the two variances only.
    """
    n = u64(n)
    pad = n + TWO_EDGES
    line = np.zeros(u64(4) * pad, np.float32)
    ring = np.empty(ROWS * u64(4) * n, np.float32)
    mu, nu = np.empty(n, np.float32), np.empty(n, np.float32)
    ss, ab = np.empty(n, np.float32), np.empty(n, np.float32)
    area = u64(height) * n
    for step in range(u64(lo), u64(hi) + u64(10)):  # the number of the row to read, plus 5
        slot = ((step + u64(6)) % ROWS) * u64(4) * n  # (row + 11) % 11
        if step < REACH or step >= u64(height) + REACH:
            for i in range(u64(4) * n):
                ring[slot + i] = ZERO
        else:
            src = (step - REACH) * n
            for i in range(n):
                a, b = image[src + i], target[src + i]
                line[EDGE + i] = a
                line[EDGE + pad + i] = b
            for i in range(n):
                a, b = line[EDGE + i], line[EDGE + pad + i]
                line[EDGE + u64(2) * pad + i] = a * a + b * b
                line[EDGE + u64(3) * pad + i] = a * b
            for f in range(u64(4)):
                blur_row(line, EDGE + f * pad, ring, slot + f * n, n)
        if step < u64(lo) + u64(10):
            continue
        row = step - u64(10)  # the output row, 5 above the newest
        blur_column(ring, row, u64(0), n, u64(4), mu)
        blur_column(ring, row, u64(1), n, u64(4), nu)
        blur_column(ring, row, u64(2), n, u64(4), ss)
        blur_column(ring, row, u64(3), n, u64(4), ab)
        at = row * n
        l1, total = ZERO, ZERO
        for i in range(n):
            l1 += abs(image[at + i] - target[at + i])
        for i in range(n):
            m1, m2 = mu[i], nu[i]
            mm, m12 = m1 * m1 + m2 * m2, m1 * m2
            n1, n2 = TWO * m12 + C1, TWO * (ab[i] - m12) + C2
            r1, r2 = ONE / (mm + C1), ONE / (ss[i] - mm + C2)
            r12 = r1 * r2
            value = n1 * n2 * r12
            total += value
            mu[i] = TWO * (m2 * (n2 - n1) * r12 - m1 * value * (r1 - r2))
            ss[i] = -value * r2
            ab[i] = TWO * n1 * r12
        if want_slopes:
            for i in range(n):
                slopes[at + i] = mu[i]
            for i in range(n):
                slopes[area + at + i] = ss[i]
            for i in range(n):
                slopes[u64(2) * area + at + i] = ab[i]
        sums[row, 0], sums[row, 1] = l1, total


@kernel
def loss_bwd(lo, hi, image, target, height, n, slopes, l1, ssim, out):
    """Write l1 * d sum |a - b| / d a + ssim * d sum SSIM / d a of rows lo..hi to out [H * n]."""
    n = u64(n)
    pad = n + TWO_EDGES
    line = np.zeros(pad, np.float32)
    ring = np.empty(ROWS * u64(3) * n, np.float32)
    g0, g1, g2 = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    area = u64(height) * n
    for step in range(u64(lo), u64(hi) + u64(10)):
        slot = ((step + u64(6)) % ROWS) * u64(3) * n
        if step < REACH or step >= u64(height) + REACH:
            for i in range(u64(3) * n):
                ring[slot + i] = ZERO
        else:
            src = (step - REACH) * n
            for f in range(u64(3)):
                for i in range(n):
                    line[EDGE + i] = slopes[f * area + src + i]
                blur_row(line, EDGE, ring, slot + f * n, n)
        if step < u64(lo) + u64(10):
            continue
        row = step - u64(10)
        blur_column(ring, row, u64(0), n, u64(3), g0)
        blur_column(ring, row, u64(1), n, u64(3), g1)
        blur_column(ring, row, u64(2), n, u64(3), g2)
        at = row * n
        for i in range(n):
            g1[i] = g0[i] + TWO * image[at + i] * g1[i]
        for i in range(n):
            a, b = image[at + i], target[at + i]
            sign = ONE if a > b else ZERO
            sign = -ONE if a < b else sign
            out[at + i] = l1 * sign + ssim * (g1[i] + b * g2[i])


class L1SSIM(torch.autograd.Function):
    """l1 * mean |a - b| + ssim * (1 - mean SSIM) of float32 images [H, W, 3]; gradient to the first only."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, target: Tensor, l1: float, ssim: float) -> Tensor:
        """Return the loss, a scalar tensor."""
        H, n = image.shape[0], image.shape[1] * image.shape[2]
        a, b = (t.detach().contiguous().numpy().reshape(-1) for t in (image, target))
        want = ctx.needs_input_grad[0]
        sums, slopes = np.empty((H, 2), np.float32), np.empty(3 * H * n if want else 0, np.float32)
        run_ranges(loss_fwd, H, a, b, H, n, sums, slopes, want, grain=64, spread=1)
        ctx.saved, ctx.shape, ctx.weights = (a, b, H, n, slopes), image.shape, (l1, ssim)
        mean = sums.sum(0, dtype=np.float64) / (H * n)
        return torch.tensor(l1 * mean[0] + ssim * (1 - mean[1]), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple:
        """Return the gradient [H, W, 3] to the image, given v, the gradient to the loss."""
        a, b, H, n, slopes = ctx.saved
        l1, ssim = (w * v.item() / (H * n) for w in ctx.weights)
        out = np.empty_like(a)
        run_ranges(loss_bwd, H, a, b, H, n, slopes, f32(l1), f32(-ssim), out, grain=64, spread=1)
        return torch.from_numpy(out).view(ctx.shape), None, None, None
