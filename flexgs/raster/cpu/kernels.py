"""Kernels of the CPU rasterizer: projection, spherical harmonics, binning, compositing, and gradients.

Every kernel is serial over a range (`lo, hi`) or a stride (`worker, workers`) of independent items and
releases the GIL; `flexgs/pool.py` runs several at once. No two items write the same place and every sum has
a fixed order, so results are bitwise equal for any number of threads. "Splats" are projected Gaussians.

The loops over 16 pixels of a row (`raster_*`) and 16 Gaussians (`project_*`) are written so that LLVM
vectorises them: unsigned indices (numba wraps negative ones, which hides the stride), one flat float32
scratch array (no aliasing to prove), a constant trip count, selects instead of branches, no float64 literals,
`np.floor` (an intrinsic) instead of `math.floor` (a call). fastmath leaves out nnan and ninf, so that selects
drop the lanes that overflowed.

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
HUGE = f32(1e30)  # no determinant of a screen covariance that can be drawn
SLACK = f32(0.01)  # pixels added around an ellipse, far above the rounding of its border

# Places in a camera record (CameraRecord in autograd.py); rotation and translation come first.
FX, FY, CX, CY, EYE, LIMITS = 12, 13, 14, 15, 16, 19


@helper
def aligned(n):
    """Return n float32 of scratch that begin on a cache line, or every vector of 16 would straddle two."""
    scratch = np.empty(n + LANES, np.float32)
    first = ((u64(0) - u64(scratch.ctypes.data)) & u64(63)) // u64(4)
    return scratch[first:first + n]


# ------------------------------------------------------------------------------------------------------------
# Projection (EWA splatting, Zwicker et al. 2001, in gsplat's form) and colours, of 16 Gaussians side by side

# Scratch of project_fwd and project_bwd, 16 floats of each: mean, quaternion, scales, cut-off; mean, conic,
# depth, radii and half height on the screen; gradients of mean and conic; view direction and 1 / distance;
# values of 15 basis functions, and gradients to them.
(G_X, G_Y, G_Z, G_QW, G_QX, G_QY, G_QZ, G_S0, G_S1, G_S2, G_TAU, G_U, G_V, G_A, G_B, G_C, G_DEPTH, G_RU,
 G_RV, G_HALF, G_VU, G_VV, G_VA, G_VB, G_VC, G_DX, G_DY, G_DZ,
 G_DINV) = (u64(TILE * field) for field in range(29))  # fmt: skip
G_VALUES, G_SLOPES, G_END = u64(29 * TILE), u64(44 * TILE), u64(59 * TILE)


@helper
def rotation(w, x, y, z):
    """Return the rotation matrix of a quaternion, its unit quaternion, and 1 / norm."""
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
def to_camera(x, y, z, cam):
    """Transform a point to camera coordinates."""
    return (cam[0] * x + cam[1] * y + cam[2] * z + cam[9],
            cam[3] * x + cam[4] * y + cam[5] * z + cam[10],
            cam[6] * x + cam[7] * y + cam[8] * z + cam[11])


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


@helper
def gather(values, i, scr, at, j, count):
    """Copy the first `count` numbers of row i into lane j of the fields of scr that begin at `at`."""
    for c in range(count):
        scr[at + c * LANES + j] = values[i, c]


@helper
def scatter(scr, at, j, values, i, count):
    """Copy lane j of `count` fields of scr, the first of which begins at `at`, into row i."""
    for c in range(count):
        values[i, c] = scr[at + c * LANES + j]


@helper
def value(k, j):
    """Return where lane j of basis function k + 1 stands in scr."""
    return G_VALUES + u64(k) * LANES + j


@helper
def slope(k, j):
    """Return where lane j of the gradient to basis function k + 1 stands in scr."""
    return G_SLOPES + u64(k) * LANES + j


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
def basis(scr, cam, count):
    """Write the directions from the camera to 16 means, and `count` functions after the constant one."""
    for j in range(LANES):
        x, y, z = scr[G_X + j] - cam[EYE], scr[G_Y + j] - cam[EYE + 1], scr[G_Z + j] - cam[EYE + 2]
        inv = ONE / np.sqrt(x * x + y * y + z * z)
        scr[G_DX + j], scr[G_DY + j], scr[G_DZ + j], scr[G_DINV + j] = x * inv, y * inv, z * inv, inv
    if count > 0:
        for j in range(LANES):
            x, y, z = scr[G_DX + j], scr[G_DY + j], scr[G_DZ + j]
            scr[value(0, j)] = -SH1 * y
            scr[value(1, j)] = SH1 * z
            scr[value(2, j)] = -SH1 * x
    if count > 3:
        for j in range(LANES):
            x, y, z = scr[G_DX + j], scr[G_DY + j], scr[G_DZ + j]
            scr[value(3, j)] = SH2 * x * y
            scr[value(4, j)] = -SH2 * y * z
            scr[value(5, j)] = SH2_0 * (TWO * z * z - x * x - y * y)
            scr[value(6, j)] = -SH2 * x * z
            scr[value(7, j)] = SH2_2 * (x * x - y * y)
    if count > 8:
        for j in range(LANES):
            x, y, z = scr[G_DX + j], scr[G_DY + j], scr[G_DZ + j]
            xx, yy, zz = x * x, y * y, z * z
            scr[value(8, j)] = -SH3_3 * y * (THREE * xx - yy)
            scr[value(9, j)] = SH3_2 * x * y * z
            scr[value(10, j)] = -SH3_1 * y * (FOUR * zz - xx - yy)
            scr[value(11, j)] = SH3_0 * z * (TWO * zz - THREE * xx - THREE * yy)
            scr[value(12, j)] = -SH3_1 * x * (FOUR * zz - xx - yy)
            scr[value(13, j)] = SH3_22 * z * (xx - yy)
            scr[value(14, j)] = -SH3_3 * x * (xx - THREE * yy)


@helper
def basis_bwd(scr, count):
    """Replace 16 directions by the gradients of sum_k slope[k] * value[k] to the means."""
    for j in range(LANES):
        x, y, z = scr[G_DX + j], scr[G_DY + j], scr[G_DZ + j]
        dx, dy, dz = ZERO, ZERO, ZERO
        if count > 0:
            dx, dy, dz = -SH1 * scr[slope(2, j)], -SH1 * scr[slope(0, j)], SH1 * scr[slope(1, j)]
        if count > 3:
            t3, t4, t5 = scr[slope(3, j)], scr[slope(4, j)], scr[slope(5, j)]
            t6, t7 = scr[slope(6, j)], scr[slope(7, j)]
            dx += SH2 * (y * t3 - z * t6) - TWO * SH2_0 * x * t5 + TWO * SH2_2 * x * t7
            dy += SH2 * (x * t3 - z * t4) - TWO * SH2_0 * y * t5 - TWO * SH2_2 * y * t7
            dz += -SH2 * (y * t4 + x * t6) + FOUR * SH2_0 * z * t5
        if count > 8:
            xx, yy, zz = x * x, y * y, z * z
            t8, t9, t10, t11 = scr[slope(8, j)], scr[slope(9, j)], scr[slope(10, j)], scr[slope(11, j)]
            t12, t13, t14 = scr[slope(12, j)], scr[slope(13, j)], scr[slope(14, j)]
            dx += (
                SH3_2 * y * z * t9 + TWO * SH3_1 * x * y * t10 - SIX * SH3_0 * x * z * t11
                - SH3_1 * (FOUR * zz - THREE * xx - yy) * t12 + TWO * SH3_22 * x * z * t13
                - SH3_3 * (SIX * x * y * t8 + THREE * (xx - yy) * t14)
            )  # fmt: skip
            dy += (
                SH3_2 * x * z * t9 - SH3_1 * (FOUR * zz - xx - THREE * yy) * t10
                - SIX * SH3_0 * y * z * t11
                + TWO * SH3_1 * x * y * t12 - TWO * SH3_22 * y * z * t13
                - SH3_3 * (THREE * (xx - yy) * t8 - SIX * x * y * t14)
            )  # fmt: skip
            dz += (
                SH3_2 * x * y * t9 - EIGHT * SH3_1 * y * z * t10
                + SH3_0 * (SIX * zz - THREE * xx - THREE * yy) * t11
                - EIGHT * SH3_1 * x * z * t12 + SH3_22 * (xx - yy) * t13
            )  # fmt: skip
        radial, inv = dx * x + dy * y + dz * z, scr[G_DINV + j]
        scr[G_DX + j] = (dx - radial * x) * inv
        scr[G_DY + j] = (dy - radial * y) * inv
        scr[G_DZ + j] = (dz - radial * z) * inv


# ------------------------------------------------------------------------------------------------------------
# Both together


@kernel
def project_fwd(lo, hi, means, quats, scales, opacities, cutoffs, sh0, shN, count, cam, width, height, eps2d,
                near, far, radius_clip, extent, means2d, conics, depths, radii, colors, splats):  # fmt: skip
    """Write means2d, conics, depths, radii and colours of Gaussians lo..hi, all 0 where one is not visible.

    splats receives what later kernels read of a visible one: its ellipse, where opacity * exp(-sigma) >=
    alpha_min, or sigma <= cut-off = ln(opacity / alpha_min), and its colour, max(0, 1/2 + SH) with
    `count` coefficients of shN.
    """
    limit = HALF * extent * extent
    scr = aligned(G_END)
    fx, fy, cx, cy = cam[FX], cam[FY], cam[CX], cam[CY]
    left, right, top, bottom = -cam[LIMITS], cam[LIMITS + 1], -cam[LIMITS + 2], cam[LIMITS + 3]
    for first in range(u64(lo), u64(hi), LANES):
        lanes = min(LANES, u64(hi) - first)
        for j in range(LANES):
            i = first + min(j, lanes - u64(1))
            gather(means, i, scr, G_X, j, u64(3))
            gather(quats, i, scr, G_QW, j, u64(4))
            gather(scales, i, scr, G_S0, j, u64(3))
            scr[G_TAU + j] = cutoffs[i]
        for j in range(LANES):
            x, y, z = to_camera(scr[G_X + j], scr[G_Y + j], scr[G_Z + j], cam)
            rz = ONE / z
            tx, ty = z * clamp(x * rz, left, right), z * clamp(y * rz, top, bottom)
            a0, a1, a2, b0, b1, b2 = view_rows(cam, fx * rz, -fx * tx * rz * rz, fy * rz, -fy * ty * rz * rz)
            r00, r01, r02, r10, r11, r12, r20, r21, r22, _, _, _, _, _ = rotation(
                scr[G_QW + j], scr[G_QX + j], scr[G_QY + j], scr[G_QZ + j])
            s0, s1, s2 = scr[G_S0 + j], scr[G_S1 + j], scr[G_S2 + j]
            u0 = (a0 * r00 + a1 * r10 + a2 * r20) * s0
            u1 = (a0 * r01 + a1 * r11 + a2 * r21) * s1
            u2 = (a0 * r02 + a1 * r12 + a2 * r22) * s2
            v0 = (b0 * r00 + b1 * r10 + b2 * r20) * s0
            v1 = (b0 * r01 + b1 * r11 + b2 * r21) * s1
            v2 = (b0 * r02 + b1 * r12 + b2 * r22) * s2
            xx = u0 * u0 + u1 * u1 + u2 * u2 + eps2d
            xy = u0 * v0 + u1 * v1 + u2 * v2
            yy = v0 * v0 + v1 * v1 + v2 * v2 + eps2d
            # det(D D' + eps I) = |u x v|^2 + eps tr(D D') + eps^2, where xx yy - xy xy would cancel.
            w0, w1, w2 = u1 * v2 - u2 * v1, u2 * v0 - u0 * v2, u0 * v1 - u1 * v0
            det = w0 * w0 + w1 * w1 + w2 * w2 + eps2d * (xx + yy - eps2d)
            tau = scr[G_TAU + j]
            cut = limit if tau > limit else tau
            reach = np.sqrt(TWO * cut)
            rx, ry = np.ceil(reach * np.sqrt(xx)), np.ceil(reach * np.sqrt(yy))
            px, py = fx * x * rz + cx, fy * y * rz + cy
            # A quaternion of norm 0 and scales that overflow make no such determinant.
            seen = (z >= near) & (z <= far) & (tau >= ZERO) & (det > ZERO) & (det < HUGE)
            seen &= (rx > radius_clip) | (ry > radius_clip)
            seen &= (px + rx > ZERO) & (px - rx < f32(width)) & (py + ry > ZERO) & (py - ry < f32(height))
            inv = ONE / det
            A, B, C = yy * inv, -xy * inv, xx * inv
            # A C - B B cancels for thin splats, but products of float32 numbers are exact in float64.
            height2 = f64(TWO * cut * A) / (f64(A) * f64(C) - f64(B) * f64(B))
            scr[G_TAU + j] = cut
            scr[G_HALF + j] = f32(np.sqrt(max(0.0, height2))) + SLACK
            scr[G_U + j] = px if seen else ZERO
            scr[G_V + j] = py if seen else ZERO
            scr[G_A + j] = A if seen else ZERO
            scr[G_B + j] = B if seen else ZERO
            scr[G_C + j] = C if seen else ZERO
            scr[G_DEPTH + j] = z if seen else ZERO
            scr[G_RU + j] = rx if seen else ZERO
            scr[G_RV + j] = ry if seen else ZERO
        basis(scr, cam, count)
        for j in range(lanes):
            i = first + j
            scatter(scr, G_U, j, means2d, i, u64(2))
            scatter(scr, G_A, j, conics, i, u64(3))
            depths[i] = scr[G_DEPTH + j]
            radii[i, 0], radii[i, 1] = i32(scr[G_RU + j]), i32(scr[G_RV + j])
            colors[i, 0] = colors[i, 1] = colors[i, 2] = ZERO
            if radii[i, 0] > 0:
                r, g, bl = HALF + SH0 * sh0[i, 0], HALF + SH0 * sh0[i, 1], HALF + SH0 * sh0[i, 2]
                for k in range(u64(count)):
                    w = scr[value(k, j)]
                    r += w * shN[i, k, 0]
                    g += w * shN[i, k, 1]
                    bl += w * shN[i, k, 2]
                r, g, bl = max(r, ZERO), max(g, ZERO), max(bl, ZERO)
                colors[i, 0], colors[i, 1], colors[i, 2] = r, g, bl
                b = i * SPLAT
                splats[b], splats[b + u64(1)] = scr[G_U + j], scr[G_V + j]
                splats[b + u64(2)], splats[b + u64(3)] = SIXTEENTH * scr[G_A + j], EIGHTH * scr[G_B + j]
                splats[b + u64(4)], splats[b + u64(5)] = SIXTEENTH * scr[G_C + j], opacities[i]
                splats[b + u64(6)], splats[b + u64(10)] = EIGHTH * scr[G_TAU + j], scr[G_HALF + j]
                splats[b + u64(7)], splats[b + u64(8)], splats[b + u64(9)] = r, g, bl


@kernel
def project_bwd(lo, hi, means, quats, scales, sigmoids, mask, shN, count, cam, conics, radii, colors,
                v_means2d, v_conics, v_opac, v_colors, v_means, v_quats, v_scales, v_opacities, v_sh0, v_shN,
                v_mask):  # fmt: skip
    """Write the gradients of means, quaternions, log-scales, logits, sh0, shN and mask of Gaussians lo..hi.

    scales and sigmoids are the activated values; mask and v_mask are [N], or empty for all ones. Colours that
    were clamped to 0 pass no gradient.
    """
    scr = aligned(G_END)
    rows = np.full(TILE, lo, np.int64)  # the next 16 visible Gaussians
    fx, fy = cam[FX], cam[FY]
    left, right, top, bottom = -cam[LIMITS], cam[LIMITS + 1], -cam[LIMITS + 2], cam[LIMITS + 3]
    masked, total, lanes = mask.shape[0] > 0, u64(shN.shape[1]), u64(0)
    for last in range(u64(lo), u64(hi)):
        vo, sig = v_opac[last], sigmoids[last]
        if masked:
            v_mask[last] = vo * sig
            vo *= mask[last]
        v_opacities[last] = vo * sig * (ONE - sig)
        if radii[last, 0] > 0:
            rows[lanes] = i64(last)
            lanes += u64(1)
        else:
            for c in range(u64(3)):
                v_means[last, c] = v_scales[last, c] = v_sh0[last, c] = ZERO
            for c in range(u64(4)):
                v_quats[last, c] = ZERO
            for k in range(total):
                v_shN[last, k, 0] = v_shN[last, k, 1] = v_shN[last, k, 2] = ZERO
        if lanes < LANES and last + u64(1) < u64(hi):
            continue
        for j in range(LANES):
            i = u64(rows[j])
            gather(means, i, scr, G_X, j, u64(3))
            gather(quats, i, scr, G_QW, j, u64(4))
            gather(scales, i, scr, G_S0, j, u64(3))
            gather(conics, i, scr, G_A, j, u64(3))
            gather(v_means2d, i, scr, G_VU, j, u64(2))
            gather(v_conics, i, scr, G_VA, j, u64(3))
        basis(scr, cam, count)
        for j in range(lanes):
            i = u64(rows[j])
            r = v_colors[i, 0] if colors[i, 0] > ZERO else ZERO
            g = v_colors[i, 1] if colors[i, 1] > ZERO else ZERO
            bl = v_colors[i, 2] if colors[i, 2] > ZERO else ZERO
            v_sh0[i, 0], v_sh0[i, 1], v_sh0[i, 2] = SH0 * r, SH0 * g, SH0 * bl
            for k in range(u64(count)):
                w = scr[value(k, j)]
                v_shN[i, k, 0], v_shN[i, k, 1], v_shN[i, k, 2] = w * r, w * g, w * bl
                scr[slope(k, j)] = shN[i, k, 0] * r + shN[i, k, 1] * g + shN[i, k, 2] * bl
            for k in range(u64(count), total):
                v_shN[i, k, 0] = v_shN[i, k, 1] = v_shN[i, k, 2] = ZERO
        basis_bwd(scr, count)
        for j in range(LANES):
            # Repeat the forward pass.
            x, y, z = to_camera(scr[G_X + j], scr[G_Y + j], scr[G_Z + j], cam)
            rz = ONE / z
            cx, cy = clamp(x * rz, left, right), clamp(y * rz, top, bottom)
            free_x, free_y = cx == x * rz, cy == y * rz
            tx, ty = z * cx, z * cy
            a0, a1, a2, b0, b1, b2 = view_rows(cam, fx * rz, -fx * tx * rz * rz, fy * rz, -fy * ty * rz * rz)
            r00, r01, r02, r10, r11, r12, r20, r21, r22, qw, qx, qy, qz, qinv = rotation(
                scr[G_QW + j], scr[G_QX + j], scr[G_QY + j], scr[G_QZ + j])
            s0, s1, s2 = scr[G_S0 + j], scr[G_S1 + j], scr[G_S2 + j]
            u0 = a0 * r00 + a1 * r10 + a2 * r20
            u1 = a0 * r01 + a1 * r11 + a2 * r21
            u2 = a0 * r02 + a1 * r12 + a2 * r22
            v0 = b0 * r00 + b1 * r10 + b2 * r20
            v1 = b0 * r01 + b1 * r11 + b2 * r21
            v2 = b0 * r02 + b1 * r12 + b2 * r22
            # d/d cov2d = -Q V Q with Q the inverse covariance; then d/d (J W R S) = 2 (d/d cov2d) (J W R S).
            A, B, C = scr[G_A + j], scr[G_B + j], scr[G_C + j]
            va, vb, vc = scr[G_VA + j], HALF * scr[G_VB + j], scr[G_VC + j]
            p00, p01 = A * va + B * vb, A * vb + B * vc
            p10, p11 = B * va + C * vb, B * vb + C * vc
            g00 = -TWO * (p00 * A + p01 * B)
            g01 = -TWO * (p00 * B + p01 * C)
            g11 = -TWO * (p10 * B + p11 * C)
            # Columns of d/d (J W R), times the scale once more where the chain needs it.
            du0, du1, du2 = (g00 * u0 + g01 * v0) * s0, (g00 * u1 + g01 * v1) * s1, (g00 * u2 + g01 * v2) * s2
            dv0, dv1, dv2 = (g01 * u0 + g11 * v0) * s0, (g01 * u1 + g11 * v1) * s1, (g01 * u2 + g11 * v2) * s2
            scr[G_S0 + j] = s0 * (du0 * u0 + dv0 * v0)  # the second s is d exp(log s)
            scr[G_S1 + j] = s1 * (du1 * u1 + dv1 * v1)
            scr[G_S2 + j] = s2 * (du2 * u2 + dv2 * v2)
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
            scr[G_QW + j], scr[G_QX + j] = (dw - radial * qw) * qinv, (dx - radial * qx) * qinv
            scr[G_QY + j], scr[G_QZ + j] = (dy - radial * qy) * qinv, (dz - radial * qz) * qinv
            # d/d (J W), then d/d J
            da0, db0 = r00 * du0 + r01 * du1 + r02 * du2, r00 * dv0 + r01 * dv1 + r02 * dv2
            da1, db1 = r10 * du0 + r11 * du1 + r12 * du2, r10 * dv0 + r11 * dv1 + r12 * dv2
            da2, db2 = r20 * du0 + r21 * du1 + r22 * du2, r20 * dv0 + r21 * dv1 + r22 * dv2
            v00 = da0 * cam[0] + da1 * cam[1] + da2 * cam[2]
            v02 = da0 * cam[6] + da1 * cam[7] + da2 * cam[8]
            v11 = db0 * cam[3] + db1 * cam[4] + db2 * cam[5]
            v12 = db0 * cam[6] + db1 * cam[7] + db2 * cam[8]
            # From the Jacobian and the screen mean to camera space; a clamped tx depends on z alone.
            rz2 = rz * rz
            vx, vy = fx * rz * scr[G_VU + j], fy * rz * scr[G_VV + j]
            vz = -(x * vx + y * vy) * rz
            vz += rz2 * (TWO * rz * (fx * tx * v02 + fy * ty * v12) - fx * v00 - fy * v11)
            vx -= fx * rz2 * v02 if free_x else ZERO
            vz -= ZERO if free_x else fx * rz2 * rz * tx * v02
            vy -= fy * rz2 * v12 if free_y else ZERO
            vz -= ZERO if free_y else fy * rz2 * rz * ty * v12
            scr[G_X + j] = cam[0] * vx + cam[3] * vy + cam[6] * vz + scr[G_DX + j]
            scr[G_Y + j] = cam[1] * vx + cam[4] * vy + cam[7] * vz + scr[G_DY + j]
            scr[G_Z + j] = cam[2] * vx + cam[5] * vy + cam[8] * vz + scr[G_DZ + j]
        for j in range(lanes):
            i = u64(rows[j])
            scatter(scr, G_X, j, v_means, i, u64(3))
            scatter(scr, G_QW, j, v_quats, i, u64(4))
            scatter(scr, G_S0, j, v_scales, i, u64(3))
        lanes = u64(0)


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
def bin_rows(lo, hi, order, unsorted, height, splats, tile_rows, starts):
    """Copy the splats at positions lo..hi of the order, and find the tile rows that their ellipses reach.

    starts[k + 1] becomes the number of tile rows of splat k.
    """
    for k in range(u64(lo), u64(hi)):
        b, src = k * SPLAT, u64(order[k]) * SPLAT
        for c in range(SPLAT):
            splats[b + c] = unsorted[src + c]
        my, half = splats[b + u64(1)], splats[b + u64(10)]
        first = clamp(np.ceil(my - half - HALF), ZERO, f32(height))
        last = clamp(np.floor(my + half - HALF), -ONE, f32(height) - ONE)
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
def raster_fwd(worker, workers, offsets, ids, splats, packed, width, height, alpha_max, t_stop,
               background, image, transmittance, last):  # fmt: skip
    """Composite tiles front to back (3DGS, Kerbl et al. 2023, eq. 3).

    packed receives each tile's splats side by side, for the backward pass.
    """
    scr = aligned(F_COLUMN + PIXELS)
    tiles_x = u64((width + TILE - 1) // TILE)
    for tile in range(u64(worker), u64(offsets.shape[0]) - u64(1), u64(workers)):
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
def raster_bwd(worker, workers, offsets, slots, packed, width, height, alpha_max, background,
               transmittance, last, v_image, v_alpha, grads):  # fmt: skip
    """Write the gradient slot of every (splat, tile) pair, going back to front.

    At a pixel, d loss / d alpha_i = T_i d_i - S_i / (1 - alpha_i), with T_i the transmittance before splat i,
    d_i its colour times the pixel's gradient, and S_i the sum of weight * d over all splats behind it plus
    the contribution of the background.
    """
    scr = aligned(B_COLUMN + PIXELS)
    acc = aligned(u64(6) * LANES)
    tiles_x = u64((width + TILE - 1) // TILE)
    for tile in range(u64(worker), u64(offsets.shape[0]) - u64(1), u64(workers)):
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
def contributions(worker, workers, offsets, slots, packed, width, height, alpha_max, t_stop, sums):
    """Write (sum of alpha * T, number of pixels, sum of T) of every (splat, tile) pair."""
    scr = aligned(PIXELS + PIXELS)
    acc = aligned(u64(3) * LANES)
    tiles_x = u64((width + TILE - 1) // TILE)
    for tile in range(u64(worker), u64(offsets.shape[0]) - u64(1), u64(workers)):
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
