/**
 * Decoder of the format .lzma with lc = lp = pb = 0, which is what the chunks of a .fgs file use.
 *
 * The decoders of npm are two thirds as fast, or bring an encoder of 12 kB along, and set no limit on what
 * comes out. The algorithm is that of Igor Pavlov's LZMA specification, which is in the public domain.
 */

const HEAD = 13; // properties, size of the dictionary, size of the data
const HALF = 1024; // a probability of one half, of 2048

const bits = (count: number) => new Uint16Array(count).fill(HALF);
const lengths = () => ({ choice: bits(2), low: bits(8), middle: bits(8), high: bits(256) });

/** Return what a .lzma file holds; an Error if it is damaged, or would give more than `most` bytes. */
export function decompress(input: Uint8Array, most: number): Uint8Array {
  if (input.length < HEAD + 5 || input[0] !== 0) throw new Error("no LZMA data");
  const out = new Uint8Array(most);
  const literal = bits(0x300), isMatch = bits(12), isRep = bits(12), isRep0Long = bits(12);
  const isRep0 = bits(12), isRep1 = bits(12), isRep2 = bits(12);
  const slots = bits(4 * 64), special = bits(128), align = bits(16);
  const matchLength = lengths(), repLength = lengths();
  let from = HEAD + 1, at = 0, range = 0xffffffff, code = 0, state = 0;
  let rep0 = 0, rep1 = 0, rep2 = 0, rep3 = 0;

  const refill = () => {
    range = (range << 8) >>> 0;
    code = ((code << 8) | input[from++]!) >>> 0; // behind the end zeros come: `from` is checked below
  };
  const bit = (p: Uint16Array, i: number): number => {
    const chance = p[i]!, bound = (range >>> 11) * chance;
    let found = 0;
    if (code < bound) {
      range = bound;
      p[i] = chance + ((2048 - chance) >> 5);
    } else {
      found = 1;
      range -= bound;
      code -= bound;
      p[i] = chance - (chance >> 5);
    }
    if (range < 0x1000000) refill();
    return found;
  };
  const tree = (p: Uint16Array, offset: number, depth: number): number => {
    let node = 1;
    for (let i = 0; i < depth; i++) node = (node << 1) | bit(p, offset + node);
    return node - (1 << depth);
  };
  const reversed = (p: Uint16Array, offset: number, depth: number): number => {
    let node = 1, value = 0;
    for (let i = 0; i < depth; i++) {
      const b = bit(p, offset + node);
      node = (node << 1) | b;
      value |= b << i;
    }
    return value;
  };
  const direct = (count: number): number => {
    let value = 0;
    while (count--) {
      range >>>= 1;
      const b = code >= range ? 1 : 0;
      if (b) code -= range;
      value = (value << 1) | b;
      if (range < 0x1000000) refill();
    }
    return value;
  };
  const length = (l: ReturnType<typeof lengths>): number => {
    if (!bit(l.choice, 0)) return 2 + tree(l.low, 0, 3);
    return bit(l.choice, 1) ? 18 + tree(l.high, 0, 8) : 10 + tree(l.middle, 0, 3);
  };
  const distance = (slot: number): number => {
    if (slot < 4) return slot;
    const count = (slot >> 1) - 1, base = (2 | (slot & 1)) << count;
    if (slot < 14) return base + reversed(special, base - slot, count);
    return (base + ((direct(count - 4) << 4) >>> 0) + reversed(align, 0, 4)) >>> 0;
  };

  for (let i = 0; i < 4; i++) code = ((code << 8) | input[from++]!) >>> 0;
  while (from <= input.length) {
    if (!bit(isMatch, state)) {
      if (at >= most) break;
      let node = 1;
      if (state >= 7) {
        for (let match = out[at - rep0 - 1]!; node < 0x100;) {
          const expected = (match >> 7) & 1;
          match <<= 1;
          const b = bit(literal, ((1 + expected) << 8) + node);
          node = (node << 1) | b;
          if (b !== expected) break;
        }
      }
      while (node < 0x100) node = (node << 1) | bit(literal, node);
      out[at++] = node;
      state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
      continue;
    }
    let count = 1;
    if (!bit(isRep, state)) {
      [rep3, rep2, rep1] = [rep2, rep1, rep0];
      count = length(matchLength);
      rep0 = distance(tree(slots, Math.min(count - 2, 3) << 6, 6));
      if (rep0 === 0xffffffff) { // the mark of the end
        if (from === input.length) return out.subarray(0, at);
        break;
      }
      state = state < 7 ? 7 : 10;
    } else if (bit(isRep0, state)) { // one of the three distances before the last
      const second = !bit(isRep1, state), third = !second && !bit(isRep2, state);
      const again = second ? rep1 : third ? rep2 : rep3;
      if (!second && !third) rep3 = rep2;
      if (!second) rep2 = rep1;
      [rep1, rep0] = [rep0, again];
      count = length(repLength);
      state = state < 7 ? 8 : 11;
    } else if (bit(isRep0Long, state)) {
      count = length(repLength);
      state = state < 7 ? 8 : 11;
    } else {
      state = state < 7 ? 9 : 11;
    }
    if (rep0 >= at || count > most - at) break;
    for (; count--; at++) out[at] = out[at - rep0 - 1]!;
  }
  throw new Error(from > input.length ? "LZMA data that is cut off" : "LZMA data that is damaged, or too long");
}
