/** Budgets such as "5%", 20000, "2MB", "16ms" or "auto", and how frame times move a cut. */

import { countAt, type Header } from "./header.js";

/** A budget in text, or a number: a ratio up to 1, a number of Gaussians above. */
export type Budget = string | number;

/** What a budget keeps of a model. */
export interface Kept {
  /** Number of Gaussians kept. */
  count: number;
  /** Ratio at which the transform is evaluated. */
  ratio: number;
}

const DEVICES: Record<string, number> = {
  quest: 500_000, visionpro: 750_000, android: 1_000_000, iphone: 1_500_000, desktop: 2_500_000,
};
const UNITS: Record<string, number> = { "": 1, gaussian: 1, gaussians: 1, k: 1e3, m: 1e6, kb: 1e3, mb: 1e6, gb: 1e9 };

/** Return the Pace of a budget that follows frame times ("auto", "16ms"); undefined for all others. */
export function paceOf(budget: Budget): Pace | undefined {
  const ms = /^([\d.]+)\s*ms$/i.exec(String(budget).trim())?.[1];
  if (ms !== undefined && !(Number(ms) > 0)) throw new Error(`budget ${budget}: expected more than 0 ms`);
  return ms ? new Pace([Number(ms)]) : String(budget).trim() === "auto" ? new Pace([1000 / 60, 1000 / 30]) : undefined;
}

/** Work out how many Gaussians a budget keeps; bytes are those of the packed file, which has to be read so far. */
export function resolve(budget: Budget, header: Header): Kept {
  const text = String(budget).trim().toLowerCase(), n = header.count;
  const [, number = "", unit = ""] = /^([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%|[a-z]*)$/.exec(text) ?? [];
  const value = Number(number), factor = UNITS[unit];
  const kept = (count: number): Kept => ({ count: Math.min(n, count), ratio: Math.min(n, count) / n });
  if (Object.hasOwn(DEVICES, text)) return kept(DEVICES[text]!);
  if (unit === "%" || (unit === "" && number && value <= 1)) {
    const ratio = unit ? value / 100 : value;
    if (ratio > 0 && ratio <= 1) return { count: countAt(ratio, n), ratio };
  } else if (unit.endsWith("b") && factor && number) {
    let end = header.start, most = 0;
    for (const chunk of header.chunks) if ((end += chunk.bytes) <= value * factor) most = chunk.ratio;
    if (most) return { count: countAt(most, n), ratio: most };
    throw new Error(`budget ${budget}: found less than the ${(header.start + header.chunks[0]!.bytes) / 1e6} MB ` +
      "of the first stage");
  } else if (factor && number && value * factor >= 1 && (unit || Number.isInteger(value))) {
    return kept(Math.floor(value * factor));
  }
  throw new Error(`budget ${budget}: expected something like 5%, 0.05, 500k, 2MB, 16ms or auto, or a device: ` +
    Object.keys(DEVICES).join(", "));
}

const FRAMES = 8; // that are looked at together
const SLOW = 1.25, GROW = 1.2, LEAST = 0.1;

/**
 * Moves a cut so that frames take no longer than a limit: down at once where they do, up in steps where they do
 * not. After each fall it waits twice as long before it tries more again, so that a picture does not pulse.
 */
export class Pace {
  #times: number[] = [];
  #calm = 0;
  #patience = 2;

  /** limits: milliseconds of a frame; the next one counts where the last would keep less than a tenth. */
  constructor(private limits: number[]) {}

  /** Take note of the milliseconds of a frame of a cut, and return the ratio of the next cut. */
  next(ms: number, ratio: number): number {
    this.#times.push(ms);
    if (this.#times.length < FRAMES) return ratio;
    const median = this.#times.sort((a, b) => a - b)[FRAMES >> 1]!, limit = this.limits[0]!;
    this.#times = [];
    if (median > SLOW * limit) {
      const less = ratio * Math.max(0.25, (0.9 * limit) / median);
      if (less < LEAST && this.limits.length > 1) this.limits = this.limits.slice(1);
      else if (less < ratio) {
        this.#calm = 0;
        this.#patience = Math.min(64, 2 * this.#patience);
        return less;
      }
    } else if (++this.#calm >= this.#patience) {
      this.#calm = 0;
      return Math.min(1, GROW * ratio);
    }
    return ratio;
  }
}
