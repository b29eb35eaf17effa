/** A cut as a PLY file, which every renderer of Gaussians reads. */

import type { Cut } from "./index.js";

/** Return the bytes of a PLY file in the layout of 3DGS, with positions about the model's origin. */
export function plyOf(cut: Cut): Uint8Array<ArrayBuffer> {
  const { count, means, quats, scales, opacities, sh0, shN } = cut, K = shN.length / (3 * count);
  const rest = Array.from({ length: 3 * K }, (_, i) => `f_rest_${i}`);
  const names = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", ...rest, "opacity",
    "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"];
  const head = new TextEncoder().encode(["ply", "format binary_little_endian 1.0", `element vertex ${count}`,
    ...names.map((name) => `property float ${name}`), "end_header", ""].join("\n"));
  const rows = new Float32Array(count * names.length);
  for (let i = 0, at = 0; i < count; i++) {
    for (let j = 0; j < 3; j++) rows[at++] = means[3 * i + j]!;
    for (let j = 0; j < 3; j++) rows[at++] = sh0[3 * i + j]!;
    for (let c = 0; c < 3; c++) { // a PLY lists all harmonics of one colour, then those of the next
      for (let k = 0; k < K; k++) rows[at++] = shN[3 * (K * i + k) + c]!;
    }
    rows[at++] = opacities[i]!;
    for (let j = 0; j < 3; j++) rows[at++] = scales[3 * i + j]!;
    for (let j = 0; j < 4; j++) rows[at++] = quats[4 * i + j]!;
  }
  const out = new Uint8Array(head.length + rows.byteLength);
  out.set(head);
  out.set(new Uint8Array(rows.buffer), head.length);
  return out;
}
