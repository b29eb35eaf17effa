/** How a packed file (.fgs, version 2) begins, and which numbers each of its chunks holds: packed_v2.py of flexgs. */

/** The attributes of a Gaussian and their numbers; harmonics above degree 0 are extra. */
export const WIDTHS = { scales: 3, means: 3, quats: 4, opacities: 1, sh0: 3 } as const;
export type Attribute = keyof typeof WIDTHS;
/** The order in which a chunk lists changes that a cut adds. */
export const CHANGED: readonly Attribute[] = ["means", "quats", "scales", "opacities", "sh0"];

export interface Chunk {
  /** The largest ratio that can be cut with the chunks up to this one. */
  ratio: number;
  bytes: number;
  crc32: number;
}

export interface Header {
  /** Bytes from the start of the file to the first chunk. */
  start: number;
  /** Number of Gaussians of the whole model. */
  count: number;
  /** Degree of the spherical harmonics, 0 to 3. */
  shDegree: number;
  /** Where (0, 0, 0) of the positions lies in the capture's own coordinates. */
  origin: [number, number, number];
  /** Length in world units in which changes of positions are counted. */
  unit: number;
  /** Ratios at which changes are stored; none if cuts change nothing. */
  knots: number[];
  /** Number of Gaussians that have changes at each knot. */
  knotRows: number[];
  chunks: Chunk[];
  last: { bytes: number; crc32: number };
  /** Bytes of the whole file. */
  size: number;
}

/** Rows of an attribute that a chunk brings, all of the Gaussians from `first` up to `last`. */
export interface Part {
  name: Attribute | "shN";
  /** The knot whose changes these are; -1 for the attribute itself. */
  knot: number;
  first: number;
  last: number;
}

export const HEAD = 16;
const MOST_HEADER = 1 << 20;
const MOST_SHRUNK = 8000; // by which LZMA can shrink data
const TABLE = Uint32Array.from({ length: 256 }, (_, i) => {
  for (let k = 0; k < 8; k++) i = i & 1 ? (i >>> 1) ^ 0xedb88320 : i >>> 1;
  return i;
});

export function crc32(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255]! ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** floor(ratio n), at least 1: how many of n Gaussians a cut keeps. */
export const countAt = (ratio: number, n: number): number => Math.max(1, Math.floor(ratio * n + 1e-9));

/** Return how many bytes the header has behind the first HEAD ones; an Error if they do not begin a .fgs file. */
export function headerBytes(head: Uint8Array): number {
  const view = new DataView(head.buffer, head.byteOffset, head.length);
  if (head.length < HEAD || String.fromCharCode(...head.subarray(0, 6)) !== "FLEXGS") {
    throw new Error("not a packed model; expected a file of `flexgs pack`");
  }
  const version = view.getUint16(6, true), length = view.getUint32(8, true);
  if (version === 1) {
    throw new Error("packed with --exact (version 1), which is not read here; pack it without --exact");
  }
  if (version !== 2) throw new Error(`format ${version}, expected 2; a newer flexgs may read it`);
  if (length > MOST_HEADER) throw new Error("the header is damaged; get the file again");
  return length;
}

/** Read the header that follows the first HEAD bytes; an Error if it is damaged or asks for what is not read here. */
export async function readHeader(head: Uint8Array, raw: Uint8Array): Promise<Header> {
  const damaged = new Error("the header is damaged; get the file again");
  if (crc32(raw) !== new DataView(head.buffer, head.byteOffset).getUint32(12, true)) throw damaged;
  const found = await inflated(raw);
  const { splats: count, sh_degree: shDegree, config } = found;
  const kind = config?.transform?.kind;
  if (kind !== "deltas" && kind !== "none") {
    throw new Error(`packed with the transform ${kind}, which is not computed here; \`flexgs cut RUN --web\` ` +
      "writes it as deltas");
  }
  const whole = (value: unknown, least: number, most: number) =>
    Number.isSafeInteger(value) && (value as number) >= least && (value as number) <= most;
  const knots: number[] = kind === "deltas" ? config.deltas.knots : [];
  const rows: number[] = kind === "deltas" ? config.deltas.rows ?? knots : [];
  const pairs: [number, number, number][] = found.chunks;
  if (!whole(count, 1, 2 ** 31) || !whole(shDegree, 0, 3) || !pairs?.length || pairs.at(-1)![0] !== 1 ||
      pairs.some(([ratio, bytes], i) => !(ratio > (pairs[i - 1]?.[0] ?? 0)) || !whole(bytes, 1, 2 ** 40)) ||
      rows.length !== knots.length || [...knots, ...rows].some((ratio) => !(ratio > 0 && ratio <= 1)) ||
      knots.some((knot, i) => i > 0 && !(knot > knots[i - 1]!))) throw damaged;
  const chunks = pairs.map(([ratio, bytes, crc]) => ({ ratio, bytes, crc32: crc }));
  const last = { bytes: found.last[0], crc32: found.last[1] };
  const start = HEAD + raw.length;
  const header: Header = {
    start, count, shDegree, origin: found.origin ?? [0, 0, 0], unit: found.unit ?? 1, knots,
    knotRows: rows.map((ratio) => countAt(ratio, count)), chunks, last,
    size: chunks.reduce((sum, chunk) => sum + chunk.bytes, start + last.bytes),
  };
  partsOf(header).forEach((parts, i) => { // before memory is taken for what a header claims
    const least = parts.reduce((sum, part) => sum + part.last - part.first, 0);
    if (least > MOST_SHRUNK * chunks[i]!.bytes) throw damaged;
  });
  return header;
}

/** Return the JSON in deflated bytes. */
export async function inflated(raw: Uint8Array): Promise<any> {
  const stream = new Blob([raw as BlobPart]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** Return what each chunk brings: of the Gaussians that enter, then of the changes at each knot. */
export function partsOf({ count, shDegree, knots, knotRows, chunks }: Header): Part[][] {
  const names = [...Object.keys(WIDTHS), ...(shDegree ? ["shN"] : [])] as Part["name"][];
  const have = knots.map(() => 0);
  let entered = 0;
  return chunks.map(({ ratio }) => {
    const kept = countAt(ratio, count);
    const parts: Part[] = kept > entered
      ? names.map((name) => ({ name, knot: -1, first: entered, last: kept })) : [];
    const rows: Part[] = [];
    knots.forEach((_, knot) => {
      const last = Math.min(knotRows[knot]!, kept), first = have[knot]!;
      if ((knots[knot - 1] ?? 0) < ratio && last > first) {
        rows.push({ name: "means", knot, first, last });
        have[knot] = last;
      }
    });
    entered = Math.max(entered, kept);
    return [...parts, ...CHANGED.flatMap((name) => rows.map((part) => ({ ...part, name })))];
  });
}
