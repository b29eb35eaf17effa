/** The program of a second worker: the order in which Gaussians are drawn, while the first one decodes. */

/** Return the Gaussians in front of the near plane, the farthest first; means [n, 3], viewmat [4, 4]. */
function farthestFirst(means: Float32Array, viewmat: ArrayLike<number>, near: number): Uint32Array<ArrayBuffer> {
  const n = means.length / 3, depths = new Float32Array(n), steps = 1 << 16;
  const [x, y, z, t] = [viewmat[8]!, viewmat[9]!, viewmat[10]!, viewmat[11]!];
  let far = near, shown = 0;
  for (let i = 0; i < n; i++) {
    const depth = depths[i] = x * means[3 * i]! + y * means[3 * i + 1]! + z * means[3 * i + 2]! + t;
    if (depth >= near) shown++;
    if (depth > far) far = depth;
  }
  // Steps are even in the logarithm of the depth: near Gaussians overlap in finer steps than distant ones.
  const scale = (steps - 1) / Math.log(far / near + 1e-6), next = new Uint32Array(steps + 1), keys = new Uint16Array(n);
  for (let i = 0; i < n; i++) {
    if (depths[i]! < near) continue;
    const key = keys[i] = (steps - 1 - Math.log(depths[i]! / near) * scale) | 0;
    next[key + 1]!++;
  }
  for (let i = 1; i <= steps; i++) next[i]! += next[i - 1]!;
  const order = new Uint32Array(shown);
  for (let i = 0; i < n; i++) if (depths[i]! >= near) order[next[keys[i]!]!++] = i;
  return order;
}

let means = new Float32Array(0);
onmessage = ({ data }: MessageEvent<{ means: Float32Array<ArrayBuffer> } | { viewmat: number[]; near: number }>) => {
  if ("means" in data) {
    means = data.means;
  } else {
    const order = farthestFirst(means, data.viewmat, data.near);
    postMessage(order, { transfer: [order.buffer] });
  }
};
