/** The Gaussians of a packed file, as far as its chunks have been read, and the cuts that they allow. */

import { CHANGED, WIDTHS, partsOf, type Attribute, type Header, type Part } from "./header.js";
import { decompress } from "./lzma.js";

/** Attributes of k Gaussians as float32, in the parametrisation of 3DGS's PLY files. */
export interface Attributes {
  /** Positions [k, 3] about the model's origin, in world units. */
  means: Float32Array;
  /** Rotations [k, 4] as quaternions w x y z of any length. */
  quats: Float32Array;
  /** Natural logarithms of the standard deviations [k, 3]. */
  scales: Float32Array;
  /** Opacities [k] before the sigmoid. */
  opacities: Float32Array;
  /** Constant spherical harmonics [k, 3]. */
  sh0: Float32Array;
}

/** Number of harmonics of a colour above degree 0. */
export const harmonics = (degree: number): number => (degree + 1) ** 2 - 1;

const NAMES = ["scales", "means", "quats", "opacities", "sh0", "shN"] as const;
const OPPONENT = [[1, 1, 1], [1, 0, -1], [1, -2, 1]].map((row, i) => row.map((x) => x / Math.sqrt([3, 2, 6][i]!)));
const CHANGES = 1.3;
const LEAST_ROUNDNESS = 2 ** -10;
const LEVELS = 4;
const MOST_WIDTH = 4; // bytes of an integer

/** Weight of the rows first to last of a knot in the changes of a cut. */
interface Term {
  knot: number;
  first: number;
  last: number;
  weight: number;
}

export class Model {
  readonly base: Attributes;
  readonly #changes: Attributes[];
  readonly #levels: Int8Array;
  readonly #parts: Part[][];
  #filled = 0;

  constructor(readonly header: Header) {
    this.#parts = partsOf(header);
    this.#levels = new Int8Array(header.count);
    this.base = zeros(header.count);
    this.#changes = header.knotRows.map(zeros);
  }

  /** The largest ratio that can be cut; 0 before the first chunk. */
  get ratio(): number {
    return this.header.chunks[this.#filled - 1]?.ratio ?? 0;
  }

  /** Read the next chunk, and return the harmonics of the Gaussians that enter; an Error if it is damaged. */
  fill(body: Uint8Array): Float32Array {
    const { shDegree } = this.header, parts = this.#parts[this.#filled]!, K = harmonics(shDegree);
    const entering = parts[0]?.knot === -1 ? parts[0] : { first: 0, last: 0 };
    const numbers = (part: Part) => part.name === "shN" ? 3 * K
      : part.name === "quats" && part.knot < 0 ? 3 : WIDTHS[part.name];
    const rows = [entering.last - entering.first,
      ...parts.flatMap((part) => Array<number>(numbers(part)).fill(part.last - part.first))];
    const head = 4 * (2 * NAMES.length + 4) + K * K;
    const least = head + rows.length, most = least + MOST_WIDTH * rows.reduce((a, b) => a + b, 0);
    const raw = decompress(body, most), widths = raw.subarray(head, least);
    if (raw.length < least || widths.some((width) => width < 1 || width > MOST_WIDTH) ||
        raw.length !== rows.reduce((end, n, i) => end + n * widths[i]!, least)) {
      throw new Error("columns that do not fill their chunk");
    }
    const view = new DataView(raw.buffer, raw.byteOffset);
    const float = (i: number) => view.getFloat32(4 * i, true);
    const steps = Object.fromEntries(NAMES.map((name, i) => [name, float(i)])) as Record<Part["name"], number>;
    const centre = [float(12), float(13), float(14)], finest = float(15);
    const basis = Float64Array.from(new Int8Array(raw.buffer, raw.byteOffset + head - K * K, K * K), (x) => x / 127);

    let at = least, column = 0;
    const integers = (): Int32Array => { // the next column; of each value the highest byte comes first
      const n = rows[column]!, width = widths[column++]!, out = new Int32Array(n);
      for (let byte = 0; byte < width; byte++, at += n) {
        for (let i = 0; i < n; i++) out[i] = (out[i]! << 8) | raw[at + i]!;
      }
      for (let i = 0; i < n; i++) out[i] = (out[i]! >>> 1) ^ -(out[i]! & 1);
      return out;
    };
    const levels = integers();
    if (levels.some((level) => Math.abs(level) > LEVELS)) throw new Error("a level that is none");
    this.#levels.set(levels, entering.first);

    const scales = this.base.scales;
    const step = (part: Part, i: number): number => { // of Gaussian i
      const level = this.#levels[i]!, factor = (part.knot < 0 ? 1 : CHANGES) * steps[part.name];
      if (part.name === "opacities") return factor;
      if (part.name === "shN") return factor * 2 ** (level / 2);
      const [a, b, c] = [scales[3 * i]!, scales[3 * i + 1]!, scales[3 * i + 2]!];
      if (part.name === "means") return factor * 2 ** level * Math.max(Math.exp((a + b + c) / 3), finest);
      if (part.name !== "quats") return factor * 2 ** level;
      const large = Math.max(a, b, c), small = Math.min(a, b, c);
      return factor * 2 ** level * Math.max(Math.exp(a + b + c - small - large - large), LEAST_ROUNDNESS);
    };

    let shN = new Float32Array(0);
    for (const part of parts) {
      const n = part.last - part.first, width = numbers(part);
      const order = byLevel(this.#levels.subarray(part.first, part.last));
      const values = new Float64Array(n * width);
      for (let j = 0; j < width; j++) {
        const whole = integers();
        for (let i = 0; i < n; i++) values[order[i]! * width + j] = whole[i]!;
      }
      for (let i = 0; i < n; i++) {
        const size = step(part, part.first + i);
        for (let j = i * width; j < (i + 1) * width; j++) values[j]! *= size;
      }
      if (part.name === "shN") {
        check(shN = harmonicsOf(values, basis, K));
      } else {
        const to = (part.knot < 0 ? this.base : this.#changes[part.knot]!)[part.name], size = WIDTHS[part.name];
        put(to, values, part, centre, this.header.unit);
        check(to.subarray(size * part.first, size * part.last));
      }
    }
    this.#filled++;
    return shN;
  }

  /** Return the first `kept` Gaussians as the transform changes them at a ratio; all of them are unchanged. */
  cut(kept: number, ratio: number): Attributes {
    const terms = kept < this.header.count ? this.#terms(kept, ratio) : [];
    return Object.fromEntries(CHANGED.map((name) => {
      const width = WIDTHS[name], out = this.base[name].slice(0, kept * width);
      for (const { knot, first, last, weight } of terms) {
        const rows = this.#changes[knot]![name], by = name === "means" ? weight * this.header.unit : weight;
        for (let i = first * width; i < last * width; i++) out[i]! += by * rows[i]!;
      }
      return [name, out];
    })) as unknown as Attributes;
  }

  /** The summands of the changes at a ratio: linear in its logarithm between knots (deltas.py). */
  #terms(kept: number, ratio: number): Term[] {
    const { knots, knotRows } = this.header, counts = knotRows.map((n) => Math.min(n, kept));
    const after = knots.filter((knot) => knot <= ratio).length;
    if (!knots.length) return [];
    if (!after) return [{ knot: 0, first: 0, last: counts[0]!, weight: 1 }];
    const left = knots[after - 1]!, right = knots[after] ?? 1, both = counts[after - 1]!;
    const weight = left < right ? Math.log(ratio / left) / Math.log(right / left) : 1;
    const lower = { knot: after - 1, first: 0, last: both, weight: 1 - weight };
    return after === knots.length ? [lower] : [lower,
      { knot: after, first: 0, last: Math.min(both, counts[after]!), weight },
      { knot: after, first: both, last: counts[after]!, weight: 1 }];
  }
}

function zeros(count: number): Attributes {
  return Object.fromEntries(CHANGED.map((name) => [name, new Float32Array(count * WIDTHS[name])])) as
    unknown as Attributes;
}

/** The rows of a chunk by rising level, equal ones in their order, as its columns list them. */
function byLevel(levels: Int8Array): Uint32Array {
  const next = new Uint32Array(2 * LEVELS + 2), order = new Uint32Array(levels.length);
  for (const level of levels) next[level + LEVELS + 1]!++;
  for (let i = 1; i < next.length; i++) next[i]! += next[i - 1]!;
  levels.forEach((level, i) => { order[next[level + LEVELS]!++] = i; });
  return order;
}

/** Write decoded columns into the rows of an attribute, or of changes of it. */
function put(to: Float32Array, values: Float64Array, part: Part & { name: string }, centre: number[], unit: number) {
  const { name, knot, first, last } = part, n = last - first;
  if (name === "means") {
    for (let i = 0; i < 3 * n; i++) to[3 * first + i] = knot < 0 ? values[i]! + centre[i % 3]! : values[i]! / unit;
  } else if (name === "quats" && knot < 0) {
    for (let i = 0; i < n; i++) {
      const [x, y, z] = [values[3 * i]!, values[3 * i + 1]!, values[3 * i + 2]!];
      to.set([Math.sqrt(Math.max(0, 1 - x * x - y * y - z * z)), x, y, z], 4 * (first + i));
    }
  } else if (name === "sh0") {
    for (let i = 0; i < n; i++) {
      for (let c = 0; c < 3; c++) {
        to[3 * (first + i) + c] = OPPONENT.reduce((sum, row, o) => sum + values[3 * i + o]! * row[c]!, 0);
      }
    }
  } else {
    to.set(values, first * (values.length / n));
  }
}

/** Harmonics [n, K, 3] from their columns: K principal parts of each of the three opponent colours. */
function harmonicsOf(values: Float64Array, basis: Float64Array, K: number): Float32Array<ArrayBuffer> {
  const out = new Float32Array(values.length), opponent = new Float64Array(3 * K);
  for (let row = 0; row < values.length; row += 3 * K) {
    for (let o = 0; o < 3; o++) {
      for (let k = 0; k < K; k++) {
        let sum = 0;
        for (let p = 0; p < K; p++) sum += basis[k * K + p]! * values[row + o * K + p]!;
        opponent[o * K + k] = sum;
      }
    }
    for (let k = 0; k < K; k++) {
      for (let c = 0; c < 3; c++) {
        out[row + 3 * k + c] = opponent[k]! * OPPONENT[0]![c]! + opponent[K + k]! * OPPONENT[1]![c]! +
          opponent[2 * K + k]! * OPPONENT[2]![c]!;
      }
    }
  }
  return out;
}

/** An Error unless all values are finite numbers. */
function check(values: Float32Array): void {
  for (const value of values) if (!Number.isFinite(value)) throw new Error("numbers that are not finite");
}
