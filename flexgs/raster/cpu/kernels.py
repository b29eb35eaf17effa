"""Kernels of the CPU rasterizer: projection, spherical harmonics, binning, compositing, and gradients.

Every kernel is serial over a range (`lo, hi`) or a stride (`worker, workers`) of independent items and
releases the GIL; `flexgs/pool.py` runs several at once. No two items write the same place and every sum has
a fixed order, so results are bitwise equal for any number of threads. "Splats" are projected Gaussians.

The row loops of `raster_*` are written so that LLVM vectorises them: unsigned indices (numba wraps negative
ones, which hides the stride), one flat float32 scratch array (no aliasing to prove), a constant trip count of
16, selects instead of branches, no float64 literals, `np.floor` (an intrinsic) instead of `math.floor` (a
call). fastmath leaves out nnan and ninf, so that selects drop the lanes that overflowed.

All kernels, helpers and constants stay in this one file, because numba's on-disk cache watches only the file
of the outermost function. Values that may change are arguments.
"""

import numpy as np
from numba import njit

FASTMATH = {"contract", "nsz", "arcp", "afn", "reassoc"}
kernel = njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
helper = njit(inline="always", fastmath=FASTMATH, error_model="numpy")

f32, f64, i32, i64, u64 = np.float32, np.float64, np.int32, np.int64, np.uint64

ZERO, HALF, ONE, TWO, EIGHT, SIXTEEN = f32(0), f32(0.5), f32(1), f32(2), f32(8), f32(16)
EIGHTH, SIXTEENTH = f32(1 / 8), f32(1 / 16)
TILE = 16  # pixels; the lanes of an AVX-512 register
LANES = u64(TILE)
PIXELS = u64(TILE * TILE)
# Floats of a packed splat: mean x y, conic a/16 b/8 c/16, opacity, cut-off / 8, r g b, half height, padding.
# Conic and cut-off are those of sigma / 8, which exp_neg takes.
SPLAT = u64(12)
SLOT = u64(9)  # floats of a gradient slot: moments 00 10 01 20 11 02 of d/d sigma, r g b
SLACK = 0.01  # pixels added around an ellipse, far above the rounding of its border

# Places in a camera record (CameraRecord in autograd.py); rotation and translation come first.
FX, FY, CX, CY, EYE, LIMITS = 12, 13, 14, 15, 16, 19


@helper
def aligned(n):
    """Return n float32 of scratch that begin on a cache line, or every vector of 16 would straddle two."""
    scratch = np.empty(n + LANES, np.float32)
    first = ((u64(0) - u64(scratch.ctypes.data)) & u64(63)) // u64(4)
    return scratch[first:first + n]


# ------------------------------------------------------------------------------------------------------------
# Projection (EWA splatting, Zwicker et al. 2001, in gsplat's form)


@helper
def rotation(quats, i):
    """Return the rotation matrix of quaternion i (w, x, y, z), its unit quaternion, and 1 / norm."""
    w, x, y, z = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
    inv = ONE / np.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w * inv, x * inv, y * inv, z * inv
    r00 = ONE - TWO * (y * y + z * z)
    r01 = TWO * (x * y - w * z)
    r02 = TWO * (x * z + w * y)
    r10 = TWO * (x * y + w * z)
    r11 = ONE - TWO * (x * x + z * z)
    r12 = TWO * (y * z - w * x)
    r20 = TWO * (x * z - w * y)
    r21 = TWO * (y * z + w * x)
    r22 = ONE - TWO * (x * x + y * y)
    return r00, r01, r02, r10, r11, r12, r20, r21, r22, w, x, y, z, inv


@helper
def to_camera(means, i, cam):
    """Transform mean i to camera coordinates."""
    mx, my, mz = means[i, 0], means[i, 1], means[i, 2]
    x = cam[0] * mx + cam[1] * my + cam[2] * mz + cam[9]
    y = cam[3] * mx + cam[4] * my + cam[5] * mz + cam[10]
    z = cam[6] * mx + cam[7] * my + cam[8] * mz + cam[11]
    return x, y, z


@helper
def view_rows(cam, j00, j02, j11, j12):
    """Return the two rows of J W, which take an offset in the world to one in pixels."""
    a0, a1, a2 = j00 * cam[0] + j02 * cam[6], j00 * cam[1] + j02 * cam[7], j00 * cam[2] + j02 * cam[8]
    b0, b1, b2 = j11 * cam[3] + j12 * cam[6], j11 * cam[4] + j12 * cam[7], j11 * cam[5] + j12 * cam[8]
    return a0, a1, a2, b0, b1, b2


@helper
def clamp(v, lo, hi):
    """Return v, at least lo and at most hi."""
    v = lo if v < lo else v
    return hi if v > hi else v


@kernel
def project_fwd(lo, hi, means, quats, scales, opacities, cam, width, height, eps2d, near, far, radius_clip,
                alpha_min, extent, means2d, conics, depths, radii):  # fmt: skip
    """Write means2d, conics, depths and radii of Gaussians lo..hi; radii are 0 where one is not visible."""
    for i in range(u64(lo), u64(hi)):
        means2d[i, 0] = means2d[i, 1] = ZERO
        conics[i, 0] = conics[i, 1] = conics[i, 2] = ZERO
        depths[i] = ZERO
        radii[i, 0] = radii[i, 1] = 0
        x, y, z = to_camera(means, i, cam)
        o = opacities[i]
        if not (z >= near and z <= far and o >= alpha_min):
            continue
        rz = ONE / z
        tx = z * clamp(x * rz, -cam[LIMITS], cam[LIMITS + 1])
        ty = z * clamp(y * rz, -cam[LIMITS + 2], cam[LIMITS + 3])
        fx, fy = cam[FX], cam[FY]
        a0, a1, a2, b0, b1, b2 = view_rows(cam, fx * rz, -fx * tx * rz * rz, fy * rz, -fy * ty * rz * rz)
        r00, r01, r02, r10, r11, r12, r20, r21, r22, _, _, _, _, _ = rotation(quats, i)
        s0, s1, s2 = scales[i, 0], scales[i, 1], scales[i, 2]
        u0 = (a0 * r00 + a1 * r10 + a2 * r20) * s0
        u1 = (a0 * r01 + a1 * r11 + a2 * r21) * s1
        u2 = (a0 * r02 + a1 * r12 + a2 * r22) * s2
        v0 = (b0 * r00 + b1 * r10 + b2 * r20) * s0
        v1 = (b0 * r01 + b1 * r11 + b2 * r21) * s1
        v2 = (b0 * r02 + b1 * r12 + b2 * r22) * s2
        xx = u0 * u0 + u1 * u1 + u2 * u2 + eps2d
        xy = u0 * v0 + u1 * v1 + u2 * v2
        yy = v0 * v0 + v1 * v1 + v2 * v2 + eps2d
        det = f64(xx) * f64(yy) - f64(xy) * f64(xy)
        if not (det > 0.0 and det < 1e30):  # also a quaternion of norm 0 and scales that overflow
            continue
        reach = np.sqrt(TWO * np.log(o / alpha_min))
        reach = extent if reach > extent else reach
        rx = np.ceil(reach * np.sqrt(xx))
        ry = np.ceil(reach * np.sqrt(yy))
        px = fx * x * rz + cam[CX]
        py = fy * y * rz + cam[CY]
        if rx <= radius_clip and ry <= radius_clip:
            continue
        if px + rx <= ZERO or px - rx >= f32(width) or py + ry <= ZERO or py - ry >= f32(height):
            continue
        inv = 1.0 / det
        means2d[i, 0], means2d[i, 1] = px, py
        conics[i, 0], conics[i, 1], conics[i, 2] = f32(yy * inv), f32(-xy * inv), f32(xx * inv)
        depths[i] = z
        radii[i, 0], radii[i, 1] = i32(rx), i32(ry)


@kernel
def project_bwd(lo, hi, means, quats, scales, sigmoids, mask, cam, conics, radii, v_means2d, v_conics, v_opac,
                v_means, v_quats, v_scales, v_opacities, v_mask):  # fmt: skip
    """Write the gradients of means, raw quaternions, log-scales, logits and mask of Gaussians lo..hi.

    scales and sigmoids are the activated values; mask and v_mask are [N], or empty for all ones.
    """
    masked = mask.shape[0] > 0
    for i in range(u64(lo), u64(hi)):
        vo, sig = v_opac[i], sigmoids[i]
        if masked:
            v_mask[i] = vo * sig
            vo *= mask[i]
        v_opacities[i] = vo * sig * (ONE - sig)
        if radii[i, 0] <= 0:
            for c in range(u64(3)):
                v_means[i, c] = v_scales[i, c] = ZERO
            for c in range(u64(4)):
                v_quats[i, c] = ZERO
            continue
        # Repeat the forward pass.
        x, y, z = to_camera(means, i, cam)
        rz = ONE / z
        fx, fy = cam[FX], cam[FY]
        cx = clamp(x * rz, -cam[LIMITS], cam[LIMITS + 1])
        cy = clamp(y * rz, -cam[LIMITS + 2], cam[LIMITS + 3])
        free_x, free_y = cx == x * rz, cy == y * rz
        tx, ty = z * cx, z * cy
        j00, j02, j11, j12 = fx * rz, -fx * tx * rz * rz, fy * rz, -fy * ty * rz * rz
        a0, a1, a2, b0, b1, b2 = view_rows(cam, j00, j02, j11, j12)
        r00, r01, r02, r10, r11, r12, r20, r21, r22, qw, qx, qy, qz, qinv = rotation(quats, i)
        s0, s1, s2 = scales[i, 0], scales[i, 1], scales[i, 2]
        u0 = a0 * r00 + a1 * r10 + a2 * r20
        u1 = a0 * r01 + a1 * r11 + a2 * r21
        u2 = a0 * r02 + a1 * r12 + a2 * r22
        v0 = b0 * r00 + b1 * r10 + b2 * r20
        v1 = b0 * r01 + b1 * r11 + b2 * r21
        v2 = b0 * r02 + b1 * r12 + b2 * r22
        # d/d cov2d = -Q V Q with Q the inverse covariance; then d/d (J W R S) = 2 (d/d cov2d) (J W R S).
        A, B, C = conics[i, 0], conics[i, 1], conics[i, 2]
        va, vb, vc = v_conics[i, 0], HALF * v_conics[i, 1], v_conics[i, 2]
        p00, p01 = A * va + B * vb, A * vb + B * vc
        p10, p11 = B * va + C * vb, B * vb + C * vc
        g00 = -TWO * (p00 * A + p01 * B)
        g01 = -TWO * (p00 * B + p01 * C)
        g11 = -TWO * (p10 * B + p11 * C)
        # Columns of d/d (J W R), times the scale once more where the chain needs it.
        du0, du1, du2 = (g00 * u0 + g01 * v0) * s0, (g00 * u1 + g01 * v1) * s1, (g00 * u2 + g01 * v2) * s2
        dv0, dv1, dv2 = (g01 * u0 + g11 * v0) * s0, (g01 * u1 + g11 * v1) * s1, (g01 * u2 + g11 * v2) * s2
        v_scales[i, 0] = s0 * (du0 * u0 + dv0 * v0)  # the second s is d exp(log s)
        v_scales[i, 1] = s1 * (du1 * u1 + dv1 * v1)
        v_scales[i, 2] = s2 * (du2 * u2 + dv2 * v2)
        du0, du1, du2, dv0, dv1, dv2 = du0 * s0, du1 * s1, du2 * s2, dv0 * s0, dv1 * s1, dv2 * s2
        # d/d R
        m00, m01, m02 = a0 * du0 + b0 * dv0, a0 * du1 + b0 * dv1, a0 * du2 + b0 * dv2
        m10, m11, m12 = a1 * du0 + b1 * dv0, a1 * du1 + b1 * dv1, a1 * du2 + b1 * dv2
        m20, m21, m22 = a2 * du0 + b2 * dv0, a2 * du1 + b2 * dv1, a2 * du2 + b2 * dv2
        dw = TWO * (qx * (m21 - m12) + qy * (m02 - m20) + qz * (m10 - m01))
        dx = TWO * (-TWO * qx * (m11 + m22) + qy * (m01 + m10) + qz * (m02 + m20) + qw * (m21 - m12))
        dy = TWO * (qx * (m01 + m10) - TWO * qy * (m00 + m22) + qz * (m12 + m21) + qw * (m02 - m20))
        dz = TWO * (qx * (m02 + m20) + qy * (m12 + m21) - TWO * qz * (m00 + m11) + qw * (m10 - m01))
        radial = dw * qw + dx * qx + dy * qy + dz * qz
        v_quats[i, 0] = (dw - radial * qw) * qinv
        v_quats[i, 1] = (dx - radial * qx) * qinv
        v_quats[i, 2] = (dy - radial * qy) * qinv
        v_quats[i, 3] = (dz - radial * qz) * qinv
        # d/d (J W), then d/d J
        da0, db0 = r00 * du0 + r01 * du1 + r02 * du2, r00 * dv0 + r01 * dv1 + r02 * dv2
        da1, db1 = r10 * du0 + r11 * du1 + r12 * du2, r10 * dv0 + r11 * dv1 + r12 * dv2
        da2, db2 = r20 * du0 + r21 * du1 + r22 * du2, r20 * dv0 + r21 * dv1 + r22 * dv2
        v00 = da0 * cam[0] + da1 * cam[1] + da2 * cam[2]
        v02 = da0 * cam[6] + da1 * cam[7] + da2 * cam[8]
        v11 = db0 * cam[3] + db1 * cam[4] + db2 * cam[5]
        v12 = db0 * cam[6] + db1 * cam[7] + db2 * cam[8]
        # From the Jacobian and the screen mean to the camera-space position; a clamped tx depends on z alone.
        rz2 = rz * rz
        vx, vy = fx * rz * v_means2d[i, 0], fy * rz * v_means2d[i, 1]
        vz = -(x * vx + y * vy) * rz
        vz += rz2 * (TWO * rz * (fx * tx * v02 + fy * ty * v12) - fx * v00 - fy * v11)
        if free_x:
            vx -= fx * rz2 * v02
        else:
            vz -= fx * rz2 * rz * tx * v02
        if free_y:
            vy -= fy * rz2 * v12
        else:
            vz -= fy * rz2 * rz * ty * v12
        v_means[i, 0] = cam[0] * vx + cam[3] * vy + cam[6] * vz
        v_means[i, 1] = cam[1] * vx + cam[4] * vy + cam[7] * vz
        v_means[i, 2] = cam[2] * vx + cam[5] * vy + cam[8] * vz


# ------------------------------------------------------------------------------------------------------------
# Spherical harmonics, the real basis of Kerbl et al. 2023 up to degree 3

SH0 = f32(0.28209479177387814)
SH1 = f32(0.4886025119029199)
SH2 = f32(1.0925484305920792)
SH2_0 = f32(0.31539156525252005)
SH2_2 = f32(0.5462742152960396)
SH3_3 = f32(0.5900435899266435)
SH3_2 = f32(2.890611442640554)
SH3_1 = f32(0.4570457994644658)
SH3_0 = f32(0.3731763325901154)
SH3_22 = f32(1.445305721320277)
THREE, FOUR, SIX = f32(3), f32(4), f32(6)


@helper
def direction(means, i, cam):
    """Return the unit direction from the camera centre to mean i, and 1 / distance."""
    x, y, z = means[i, 0] - cam[EYE], means[i, 1] - cam[EYE + 1], means[i, 2] - cam[EYE + 2]
    inv = ONE / np.sqrt(x * x + y * y + z * z)
    return x * inv, y * inv, z * inv, inv


@helper
def basis(x, y, z, count, b):
    """Write the first `count` basis functions after the constant one, at a unit direction, into b."""
    if count > 0:
        b[0], b[1], b[2] = -SH1 * y, SH1 * z, -SH1 * x
    if count > 3:
        xx, yy, zz = x * x, y * y, z * z
        b[3] = SH2 * x * y
        b[4] = -SH2 * y * z
        b[5] = SH2_0 * (TWO * zz - xx - yy)
        b[6] = -SH2 * x * z
        b[7] = SH2_2 * (xx - yy)
        if count > 8:
            b[8] = -SH3_3 * y * (THREE * xx - yy)
            b[9] = SH3_2 * x * y * z
            b[10] = -SH3_1 * y * (FOUR * zz - xx - yy)
            b[11] = SH3_0 * z * (TWO * zz - THREE * xx - THREE * yy)
            b[12] = -SH3_1 * x * (FOUR * zz - xx - yy)
            b[13] = SH3_22 * z * (xx - yy)
            b[14] = -SH3_3 * x * (xx - THREE * yy)


@helper
def basis_grad(x, y, z, count, t):
    """Return the gradient of sum_k t[k] * basis[k] to the direction."""
    dx, dy, dz = -SH1 * t[2], -SH1 * t[0], SH1 * t[1]
    if count > 3:
        dx += SH2 * (y * t[3] - z * t[6]) - TWO * SH2_0 * x * t[5] + TWO * SH2_2 * x * t[7]
        dy += SH2 * (x * t[3] - z * t[4]) - TWO * SH2_0 * y * t[5] - TWO * SH2_2 * y * t[7]
        dz += -SH2 * (y * t[4] + x * t[6]) + FOUR * SH2_0 * z * t[5]
        if count > 8:
            xx, yy, zz = x * x, y * y, z * z
            dx += (
                SH3_2 * y * z * t[9] + TWO * SH3_1 * x * y * t[10] - SIX * SH3_0 * x * z * t[11]
                - SH3_1 * (FOUR * zz - THREE * xx - yy) * t[12] + TWO * SH3_22 * x * z * t[13]
                - SH3_3 * (SIX * x * y * t[8] + THREE * (xx - yy) * t[14])
            )  # fmt: skip
            dy += (
                SH3_2 * x * z * t[9] - SH3_1 * (FOUR * zz - xx - THREE * yy) * t[10]
                - SIX * SH3_0 * y * z * t[11]
                + TWO * SH3_1 * x * y * t[12] - TWO * SH3_22 * y * z * t[13]
                - SH3_3 * (THREE * (xx - yy) * t[8] - SIX * x * y * t[14])
            )  # fmt: skip
            dz += (
                SH3_2 * x * y * t[9] - EIGHT * SH3_1 * y * z * t[10]
                + SH3_0 * (SIX * zz - THREE * xx - THREE * yy) * t[11]
                - EIGHT * SH3_1 * x * z * t[12] + SH3_22 * (xx - yy) * t[13]
            )  # fmt: skip
    return dx, dy, dz


@kernel
def sh_fwd(lo, hi, means, sh0, shN, count, cam, radii, colors):
    """Write the colours max(0, 1/2 + SH) of Gaussians lo..hi, or 0 where one is not visible.

    Only the first `count` coefficients of shN are used.
    """
    b = np.empty(16, np.float32)
    for i in range(u64(lo), u64(hi)):
        r, g, bl = ZERO, ZERO, ZERO
        if radii[i, 0] > 0:
            r, g, bl = HALF + SH0 * sh0[i, 0], HALF + SH0 * sh0[i, 1], HALF + SH0 * sh0[i, 2]
            if count > 0:
                x, y, z, _ = direction(means, i, cam)
                basis(x, y, z, count, b)
                for k in range(u64(count)):
                    w = b[k]
                    r += w * shN[i, k, 0]
                    g += w * shN[i, k, 1]
                    bl += w * shN[i, k, 2]
        colors[i, 0], colors[i, 1], colors[i, 2] = max(r, ZERO), max(g, ZERO), max(bl, ZERO)


@kernel
def sh_bwd(lo, hi, means, sh0, shN, count, cam, radii, colors, v_colors, v_means, v_sh0, v_shN):
    """Write the gradients of means (by the view direction), sh0 and shN; colours clamped to 0 pass none."""
    b = np.empty(16, np.float32)
    t = np.empty(16, np.float32)
    total = u64(shN.shape[1])
    for i in range(u64(lo), u64(hi)):
        v_means[i, 0] = v_means[i, 1] = v_means[i, 2] = ZERO
        if radii[i, 0] <= 0:
            v_sh0[i, 0] = v_sh0[i, 1] = v_sh0[i, 2] = ZERO
            for k in range(total):
                v_shN[i, k, 0] = v_shN[i, k, 1] = v_shN[i, k, 2] = ZERO
            continue
        r = v_colors[i, 0] if colors[i, 0] > ZERO else ZERO
        g = v_colors[i, 1] if colors[i, 1] > ZERO else ZERO
        bl = v_colors[i, 2] if colors[i, 2] > ZERO else ZERO
        v_sh0[i, 0], v_sh0[i, 1], v_sh0[i, 2] = SH0 * r, SH0 * g, SH0 * bl
        for k in range(u64(count), total):
            v_shN[i, k, 0] = v_shN[i, k, 1] = v_shN[i, k, 2] = ZERO
        if count > 0:
            x, y, z, inv = direction(means, i, cam)
            basis(x, y, z, count, b)
            for k in range(u64(count)):
                w = b[k]
                v_shN[i, k, 0], v_shN[i, k, 1], v_shN[i, k, 2] = w * r, w * g, w * bl
                t[k] = shN[i, k, 0] * r + shN[i, k, 1] * g + shN[i, k, 2] * bl
            dx, dy, dz = basis_grad(x, y, z, count, t)
            radial = dx * x + dy * y + dz * z
            v_means[i, 0] = (dx - radial * x) * inv
            v_means[i, 1] = (dy - radial * y) * inv
            v_means[i, 2] = (dz - radial * z) * inv


# ------------------------------------------------------------------------------------------------------------
# Depth order and binning


@kernel
def depth_order(bits, radii):
    """Return the indices of the visible Gaussians by depth, equal depths by index (gsplat's order).

    bits [N] are the float32 depths as uint32, whose order is the same for positive floats. This is a stable
    LSD radix sort with three digits of 11 bits.
    """
    n = u64(0)
    for i in range(u64(bits.shape[0])):
        n += u64(radii[i, 0] > 0)
    ids, ids2 = np.empty(n, np.int32), np.empty(n, np.int32)
    keys, keys2 = np.empty(n, np.uint32), np.empty(n, np.uint32)
    hist = np.zeros((3, 2048), np.uint64)
    m = u64(0)
    for i in range(u64(bits.shape[0])):
        if radii[i, 0] > 0:
            key = bits[i]
            ids[m], keys[m] = i32(i), key
            hist[0, key & u64(2047)] += u64(1)
            hist[1, (key >> u64(11)) & u64(2047)] += u64(1)
            hist[2, key >> u64(22)] += u64(1)
            m += u64(1)
    for d in range(u64(3)):
        start = u64(0)
        for v in range(u64(2048)):
            count = hist[d, v]
            hist[d, v] = start
            start += count
        for k in range(n):
            key = keys[k]
            v = (key >> (u64(11) * d)) & u64(2047)
            at = hist[d, v]
            hist[d, v] = at + u64(1)
            ids2[at], keys2[at] = ids[k], key
        ids, ids2 = ids2, ids
        keys, keys2 = keys2, keys
    return ids


@kernel
def bin_rows(lo, hi, order, means2d, conics, opacities, colors, alpha_min, extent, height, splats, tile_rows,
             starts):
    """Pack the splats at positions lo..hi of the order, and find the tile rows that their ellipses reach.

    The ellipse is where opacity * exp(-sigma) >= alpha_min: sigma <= cut-off = ln(opacity / alpha_min).
    starts[k + 1] becomes the number of tile rows of splat k.
    """
    for k in range(u64(lo), u64(hi)):
        i = u64(order[k])
        A, B, C, o = conics[i, 0], conics[i, 1], conics[i, 2], opacities[i]
        tau = np.log(o / alpha_min)
        limit = HALF * extent * extent
        tau = limit if tau > limit else tau
        # A C - B B cancels for thin splats, but products of float32 numbers are exact in float64.
        det = f64(A) * f64(C) - f64(B) * f64(B)
        my = f64(means2d[i, 1])
        half = np.sqrt(max(0.0, 2.0 * f64(tau) * f64(A) / det)) + SLACK
        b = k * SPLAT
        splats[b], splats[b + u64(1)] = means2d[i, 0], means2d[i, 1]
        splats[b + u64(2)], splats[b + u64(3)], splats[b + u64(4)] = SIXTEENTH * A, EIGHTH * B, SIXTEENTH * C
        splats[b + u64(5)], splats[b + u64(6)] = o, EIGHTH * tau
        splats[b + u64(7)], splats[b + u64(8)], splats[b + u64(9)] = colors[i, 0], colors[i, 1], colors[i, 2]
        splats[b + u64(10)], splats[b + u64(11)] = f32(half), ZERO
        first = clamp(np.ceil(my - half - 0.5), 0.0, f64(height))
        last = clamp(np.floor(my + half - 0.5), -1.0, f64(height) - 1.0)
        t0, t1 = i32(first) // TILE, i32(last) // TILE + 1
        if last < first:
            t1 = t0
        tile_rows[k, 0], tile_rows[k, 1] = t0, t1
        starts[k + u64(1)] = t1 - t0


@kernel
def prefix(counts):
    """Replace counts by their running sums; returns the last one."""
    total = counts[0]
    for k in range(u64(1), u64(counts.shape[0])):
        total += counts[k]
        counts[k] = total
    return total


@kernel
def bin_cols(lo, hi, splats, tile_rows, starts, width, height, tile_cols, pairs):
    """Find the tile columns that each ellipse reaches in each of its tile rows.

    Within the pixel centres of a tile row, the ellipse reaches furthest right at the height of its rightmost
    point, clamped to the row (its right border is a concave function of y); the same holds on the left.
    pairs[k + 1] becomes the number of tiles of splat k.
    """
    for k in range(u64(lo), u64(hi)):
        b = k * SPLAT
        mx, my = f64(splats[b]), f64(splats[b + u64(1)])
        A, C = 16.0 * f64(splats[b + u64(2)]), 16.0 * f64(splats[b + u64(4)])
        B = 8.0 * f64(splats[b + u64(3)])
        two_tau = 16.0 * f64(splats[b + u64(6)])
        det = A * C - B * B
        rise = B / C * np.sqrt(max(0.0, two_tau * C / det))  # the rightmost point lies at dy = -rise
        half = np.sqrt(max(0.0, two_tau * A / det))
        inv = 1.0 / A
        count = 0
        row = u64(starts[k])
        for t in range(tile_rows[k, 0], tile_rows[k, 1]):
            d0 = clamp(TILE * t + 0.5 - my - SLACK, -half, half)
            d1 = clamp(min(TILE * t + TILE, height) - 0.5 - my + SLACK, -half, half)
            dr, dl = clamp(-rise, d0, d1), clamp(rise, d0, d1)
            right = mx + (np.sqrt(max(0.0, two_tau * A - det * dr * dr)) - B * dr) * inv + SLACK
            left = mx - (np.sqrt(max(0.0, two_tau * A - det * dl * dl)) + B * dl) * inv - SLACK
            first = clamp(np.ceil(left - 0.5), 0.0, f64(width))
            last = clamp(np.floor(right - 0.5), -1.0, f64(width) - 1.0)
            t0, t1 = i32(first) // TILE, i32(last) // TILE + 1
            if last < first:
                t1 = t0
            tile_cols[row, 0], tile_cols[row, 1] = t0, t1
            count += t1 - t0
            row += u64(1)
        pairs[k + u64(1)] = count


@kernel
def bin_fill(tile_rows, starts, tile_cols, pairs, tiles_x, offsets, ids, slots):
    """List the splats of each tile in depth order: tile t has ids[offsets[t]:offsets[t + 1]].

    slots has for each entry its place among the pairs sorted by splat, where its gradient goes. offsets
    [tiles + 1] is zero on entry.
    """
    n = u64(tile_rows.shape[0])
    for k in range(n):
        row = u64(starts[k])
        for ty in range(tile_rows[k, 0], tile_rows[k, 1]):
            base = ty * tiles_x
            for tx in range(tile_cols[row, 0], tile_cols[row, 1]):
                offsets[u64(base + tx)] += 1
            row += u64(1)
    total = i32(0)
    for t in range(u64(offsets.shape[0])):
        count = offsets[t]
        offsets[t] = total
        total += count
    cursor = offsets.copy()
    for k in range(n):
        row = u64(starts[k])
        slot = pairs[k]
        for ty in range(tile_rows[k, 0], tile_rows[k, 1]):
            base = ty * tiles_x
            for tx in range(tile_cols[row, 0], tile_cols[row, 1]):
                t = u64(base + tx)
                at = u64(cursor[t])
                cursor[t] += 1
                ids[at], slots[at] = i32(k), slot
                slot += 1
            row += u64(1)


# ------------------------------------------------------------------------------------------------------------
# Compositing

# exp(-s) = p(s / 8)^8 with p of degree 5 and p(0) = 1, minimax in relative error over s in [0, 5.56]: 7e-7 in
# exact arithmetic, 2e-6 in float32. Values beyond that range are not used.
E0, E1, E2 = f32(1), f32(-0.9999949434027285), f32(0.4999025034130352)
E3, E4, E5 = f32(-0.16604115615786996), f32(0.03987175292030733), f32(-0.0059000549244483)


@helper
def exp_neg(u):
    """Return exp(-8 u)."""
    p = ((((E5 * u + E4) * u + E3) * u + E2) * u + E1) * u + E0
    p = p * p
    p = p * p
    return p * p


@helper
def tile_rows_of(my, half):
    """Return the first row, and one past the last, that a splat at height my reaches of a tile's 16 rows."""
    first, end = i64(np.ceil(my - half)), i64(np.floor(my + half)) + 1
    return u64(min(max(first, 0), TILE)), u64(min(max(end, 0), TILE))  # as integers: without branches


# Scratch of raster_fwd, a float of each per pixel: transmittance (negative once the pixel is finished), r, g,
# b, the number of splats up to the last that contributes, and x of the pixel's centre. The x take a table as
# long as the others, so that the row loop's addresses differ by constants, with no overlap for LLVM to check.
F_R, F_G, F_B, F_LAST, F_COLUMN = PIXELS, u64(2) * PIXELS, u64(3) * PIXELS, u64(4) * PIXELS, u64(5) * PIXELS


@kernel
def raster_fwd(worker, workers, tile_order, offsets, ids, splats, packed, width, height, alpha_max, t_stop,
               background, image, transmittance, last):  # fmt: skip
    """Composite tiles front to back (3DGS, Kerbl et al. 2023, eq. 3).

    packed receives each tile's splats side by side, for the backward pass.
    """
    scr = aligned(F_COLUMN + PIXELS)
    tiles_x = u64((width + TILE - 1) // TILE)
    for q in range(u64(worker), u64(tile_order.shape[0]), u64(workers)):
        tile = u64(tile_order[q])
        ty = tile // tiles_x
        x0, y0 = (tile - ty * tiles_x) * LANES, ty * LANES
        cols, rows = min(LANES, u64(width) - x0), min(LANES, u64(height) - y0)
        for p in range(PIXELS):
            scr[p] = -ONE
            scr[F_R + p] = scr[F_G + p] = scr[F_B + p] = scr[F_LAST + p] = ZERO
            scr[F_COLUMN + p] = f32(x0 + p % LANES) + HALF
        for row in range(rows):
            for j in range(cols):
                scr[row * LANES + j] = ONE
        cy = f32(y0) + HALF
        begin, end = u64(offsets[tile]), u64(offsets[tile + u64(1)])
        for m in range(begin, end):
            b, src = m * SPLAT, u64(ids[m]) * SPLAT
            for c in range(SPLAT):
                packed[b + c] = splats[src + c]
        for m in range(begin, end):
            if (m - begin) & u64(15) == u64(15):
                alive = i32(0)
                for p in range(PIXELS):
                    alive |= i32(scr[p] > ZERO)
                if alive == 0:
                    break
            b = m * SPLAT
            mx, my = packed[b], packed[b + u64(1)] - cy
            ha, bb, hc = packed[b + u64(2)], packed[b + u64(3)], packed[b + u64(4)]
            o, tau = packed[b + u64(5)], packed[b + u64(6)]
            r, g, bl = packed[b + u64(7)], packed[b + u64(8)], packed[b + u64(9)]
            row0, row1 = tile_rows_of(my, packed[b + u64(10)])
            seen = f32(m - begin + u64(1))
            for row in range(row0, row1):
                dy = my - f32(row)
                s0, s1 = hc * dy * dy, bb * dy
                t = row * LANES
                for j in range(LANES):
                    dx = mx - scr[F_COLUMN + t + j]
                    s = (ha * dx + s1) * dx + s0
                    a = o * exp_neg(s)
                    a = alpha_max if a > alpha_max else a
                    T = scr[t + j]
                    w = a * T
                    hit = (s >= ZERO) & (s <= tau)
                    left = T - w
                    go = hit & (left > t_stop)  # never where T < 0
                    end = hit & (left <= t_stop)
                    w = w if go else ZERO
                    left = T - w
                    scr[t + j] = -abs(left) if end else left
                    scr[F_R + t + j] += w * r
                    scr[F_G + t + j] += w * g
                    scr[F_B + t + j] += w * bl
                    scr[F_LAST + t + j] = seen if go else scr[F_LAST + t + j]
        for row in range(rows):
            for j in range(cols):
                p = row * LANES + j
                T = abs(scr[p])
                y, x = y0 + row, x0 + j
                image[y, x, 0] = scr[F_R + p] + T * background[0]
                image[y, x, 1] = scr[F_G + p] + T * background[1]
                image[y, x, 2] = scr[F_B + p] + T * background[2]
                transmittance[y, x] = T
                last[y, x] = scr[F_LAST + p]


# Scratch of raster_bwd, a float of each per pixel: transmittance, S (see raster_bwd), the gradient of the
# pixel's r, g, b, `last` of the forward pass, and x of the pixel's centre.
# Sums of a splat per column: d loss / d sigma, its first and second moment in y, the gradient of r, g, b.
B_S, B_R, B_G, B_B, B_LAST = PIXELS, u64(2) * PIXELS, u64(3) * PIXELS, u64(4) * PIXELS, u64(5) * PIXELS
B_COLUMN = u64(6) * PIXELS
A_M1, A_M2, A_R, A_G, A_B = LANES, u64(2) * LANES, u64(3) * LANES, u64(4) * LANES, u64(5) * LANES


@kernel
def raster_bwd(worker, workers, tile_order, offsets, slots, packed, width, height, alpha_max, background,
               transmittance, last, v_image, v_alpha, grads):  # fmt: skip
    """Write the gradient slot of every (splat, tile) pair, going back to front.

    At a pixel, d loss / d alpha_i = T_i d_i - S_i / (1 - alpha_i), with T_i the transmittance before splat i,
    d_i its colour times the pixel's gradient, and S_i the sum of weight * d over all splats behind it plus
    the contribution of the background.
    """
    scr = aligned(B_COLUMN + PIXELS)
    acc = aligned(u64(6) * LANES)
    tiles_x = u64((width + TILE - 1) // TILE)
    for q in range(u64(worker), u64(tile_order.shape[0]), u64(workers)):
        tile = u64(tile_order[q])
        ty = tile // tiles_x
        x0, y0 = (tile - ty * tiles_x) * LANES, ty * LANES
        cols, rows = min(LANES, u64(width) - x0), min(LANES, u64(height) - y0)
        for p in range(u64(6) * PIXELS):
            scr[p] = ZERO
        for p in range(PIXELS):
            scr[B_COLUMN + p] = f32(x0 + p % LANES) + HALF
        deepest = ZERO
        for row in range(rows):
            for j in range(cols):
                p = row * LANES + j
                y, x = y0 + row, x0 + j
                r, g, bl = v_image[y, x, 0], v_image[y, x, 1], v_image[y, x, 2]
                T = transmittance[y, x]
                scr[p] = T
                scr[B_S + p] = T * (background[0] * r + background[1] * g + background[2] * bl
                                    - v_alpha[y, x])
                scr[B_R + p], scr[B_G + p], scr[B_B + p] = r, g, bl
                scr[B_LAST + p] = last[y, x]
                deepest = max(deepest, last[y, x])
        cy = f32(y0) + HALF
        begin, end = u64(offsets[tile]), u64(offsets[tile + u64(1)])
        used = begin + u64(deepest)
        for m in range(used, end):
            at = u64(slots[m]) * SLOT
            for c in range(SLOT):
                grads[at + c] = ZERO
        for back in range(used - begin):
            m = used - u64(1) - back
            b = m * SPLAT
            mx, my = packed[b], packed[b + u64(1)] - cy
            ha, bb, hc = packed[b + u64(2)], packed[b + u64(3)], packed[b + u64(4)]
            o, tau = packed[b + u64(5)], packed[b + u64(6)]
            r, g, bl = packed[b + u64(7)], packed[b + u64(8)], packed[b + u64(9)]
            row0, row1 = tile_rows_of(my, packed[b + u64(10)])
            seen = f32(m - begin + u64(1))
            for j in range(u64(6) * LANES):
                acc[j] = ZERO
            for row in range(row0, row1):
                dy = my - f32(row)
                s0, s1 = hc * dy * dy, bb * dy
                t = row * LANES
                for j in range(LANES):
                    dx = mx - scr[B_COLUMN + t + j]
                    s = (ha * dx + s1) * dx + s0
                    e = o * exp_neg(s)
                    a = alpha_max if e > alpha_max else e
                    hit = (s >= ZERO) & (s <= tau) & (seen <= scr[B_LAST + t + j])
                    a = a if hit else ZERO
                    ra = ONE / (ONE - a)
                    T = scr[t + j] * ra
                    scr[t + j] = T
                    w = a * T
                    vr, vg, vb = scr[B_R + t + j], scr[B_G + t + j], scr[B_B + t + j]
                    d = r * vr + g * vg + bl * vb
                    S = scr[B_S + t + j]
                    scr[B_S + t + j] = S + w * d
                    vs = a * (S * ra - T * d)
                    vs = vs if e <= alpha_max else ZERO
                    acc[j] += vs
                    acc[A_M1 + j] += vs * dy
                    acc[A_M2 + j] += vs * dy * dy
                    acc[A_R + j] += w * vr
                    acc[A_G + j] += w * vg
                    acc[A_B + j] += w * vb
            m00, m10, m20, m01, m11, m02 = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
            vr, vg, vb = ZERO, ZERO, ZERO
            for j in range(LANES):
                dx = mx - scr[B_COLUMN + j]
                v0, v1 = acc[j], acc[A_M1 + j]
                m00 += v0
                m10 += v0 * dx
                m20 += v0 * dx * dx
                m01 += v1
                m11 += v1 * dx
                m02 += acc[A_M2 + j]
                vr += acc[A_R + j]
                vg += acc[A_G + j]
                vb += acc[A_B + j]
            at = u64(slots[m]) * SLOT
            grads[at], grads[at + u64(1)], grads[at + u64(2)] = m00, m10, m01
            grads[at + u64(3)], grads[at + u64(4)], grads[at + u64(5)] = m20, m11, m02
            grads[at + u64(6)], grads[at + u64(7)], grads[at + u64(8)] = vr, vg, vb


@kernel
def reduce_grads(lo, hi, order, pairs, grads, splats, v_means2d, v_conics, v_opac, v_colors):
    """Sum the gradient slots of the splats at positions lo..hi of the order; moments become gradients."""
    for k in range(u64(lo), u64(hi)):
        m00, m10, m01, m20, m11, m02 = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
        r, g, bl = ZERO, ZERO, ZERO
        for slot in range(u64(pairs[k]), u64(pairs[k + u64(1)])):
            at = slot * SLOT
            m00 += grads[at]
            m10 += grads[at + u64(1)]
            m01 += grads[at + u64(2)]
            m20 += grads[at + u64(3)]
            m11 += grads[at + u64(4)]
            m02 += grads[at + u64(5)]
            r += grads[at + u64(6)]
            g += grads[at + u64(7)]
            bl += grads[at + u64(8)]
        i, b = u64(order[k]), k * SPLAT
        A, B, C = SIXTEEN * splats[b + u64(2)], EIGHT * splats[b + u64(3)], SIXTEEN * splats[b + u64(4)]
        v_means2d[i, 0], v_means2d[i, 1] = A * m10 + B * m01, B * m10 + C * m01
        v_conics[i, 0], v_conics[i, 1], v_conics[i, 2] = HALF * m20, m11, HALF * m02
        v_opac[i] = -m00 / splats[b + u64(5)]
        v_colors[i, 0], v_colors[i, 1], v_colors[i, 2] = r, g, bl


# ------------------------------------------------------------------------------------------------------------
# Contributions

@kernel
def contributions(worker, workers, tile_order, offsets, slots, packed, width, height, alpha_max, t_stop,
                  sums):
    """Write (sum of alpha * T, number of pixels, sum of T) of every (splat, tile) pair."""
    scr = aligned(PIXELS + PIXELS)
    acc = aligned(u64(3) * LANES)
    tiles_x = u64((width + TILE - 1) // TILE)
    for q in range(u64(worker), u64(tile_order.shape[0]), u64(workers)):
        tile = u64(tile_order[q])
        ty = tile // tiles_x
        x0, y0 = (tile - ty * tiles_x) * LANES, ty * LANES
        for p in range(PIXELS):
            scr[p], scr[PIXELS + p] = -ONE, f32(x0 + p % LANES) + HALF
        for row in range(min(LANES, u64(height) - y0)):
            for j in range(min(LANES, u64(width) - x0)):
                scr[row * LANES + j] = ONE
        cy = f32(y0) + HALF
        for m in range(u64(offsets[tile]), u64(offsets[tile + u64(1)])):
            b = m * SPLAT
            mx, my = packed[b], packed[b + u64(1)] - cy
            ha, bb, hc = packed[b + u64(2)], packed[b + u64(3)], packed[b + u64(4)]
            o, tau = packed[b + u64(5)], packed[b + u64(6)]
            row0, row1 = tile_rows_of(my, packed[b + u64(10)])
            for j in range(u64(3) * LANES):
                acc[j] = ZERO
            for row in range(row0, row1):
                dy = my - f32(row)
                s0, s1 = hc * dy * dy, bb * dy
                t = row * LANES
                for j in range(LANES):
                    dx = mx - scr[PIXELS + t + j]
                    s = (ha * dx + s1) * dx + s0
                    a = o * exp_neg(s)
                    a = alpha_max if a > alpha_max else a
                    T = scr[t + j]
                    w = a * T
                    hit = (s >= ZERO) & (s <= tau)
                    left = T - w
                    go = hit & (left > t_stop)
                    end = hit & (left <= t_stop)
                    w = w if go else ZERO
                    acc[j] += w
                    acc[LANES + j] += ONE if go else ZERO
                    acc[u64(2) * LANES + j] += T if go else ZERO
                    left = T - w
                    scr[t + j] = -abs(left) if end else left
            at = u64(slots[m]) * u64(3)
            for c in range(u64(3)):
                total = ZERO
                for j in range(LANES):
                    total += acc[c * LANES + j]
                sums[at + c] = total


@kernel
def reduce_contributions(lo, hi, order, pairs, sums, out):
    """Sum the contributions of the splats at positions lo..hi of the order over their tiles, in float64."""
    for k in range(u64(lo), u64(hi)):
        w, hits, T = 0.0, 0.0, 0.0
        for slot in range(u64(pairs[k]), u64(pairs[k + u64(1)])):
            at = slot * u64(3)
            w += f64(sums[at])
            hits += f64(sums[at + u64(1)])
            T += f64(sums[at + u64(2)])
        i = u64(order[k])
        out[i, 0], out[i, 1], out[i, 2] = f32(w), f32(hits), f32(T)
