/** What runs in the worker: reads a file from the front, decodes its chunks, and cuts. */

import { countAt, crc32, HEAD, headerBytes, inflated, readHeader, type Header } from "./header.js";
import { Model, type Attributes } from "./model.js";
import { Lost, Source } from "./source.js";
import type { Kept } from "./budget.js";

/** A cut, and the harmonics of the Gaussians that have come since the last one. */
export interface Made extends Attributes, Kept {}

export type Order =
  | { type: "open"; url: string | ReadableStream<Uint8Array> }
  | { type: "budget"; kept: Kept }
  | { type: "pause" }
  | { type: "resume" }
  | { type: "cameras" };

export type Report =
  | { type: "opened"; header: Header }
  | { type: "progress"; loaded: number }
  | { type: "shN"; first: number; values: Float32Array }
  | { type: "cut"; cut: Made; last: boolean }
  | { type: "cameras"; rows: number[][] }
  | { type: "failed"; message: string; of?: "cameras" };

/** Where orders come from and reports go: the worker itself, or an end of a channel. */
export interface Port {
  postMessage(message: Report, transfer?: Transferable[]): void;
  onmessage: ((event: MessageEvent) => void) | null;
}

/** Do what comes through a port; returns a function that ends it. */
export function serve(port: Port): () => void {
  let source: Source, model: Model | undefined, wanted: Kept | undefined;
  let running = false, paused = false;
  let known: (model: Model) => void;
  const first = new Promise<Model>((resolve) => { known = resolve; });

  port.onmessage = ({ data: order }: MessageEvent<Order>) => {
    if (order.type === "open") {
      source = new Source(order.url, (loaded) => port.postMessage({ type: "progress", loaded }));
    } else if (order.type === "budget") {
      wanted = order.kept;
      if (model?.ratio) cut(model, wanted); // at once, whatever is being loaded, or is not
    } else if (order.type === "pause") {
      paused = true;
      source.abort();
    } else if (order.type === "resume") {
      paused = false;
    } else {
      cameras().catch((e: Error) => port.postMessage({ type: "failed", message: e.message, of: "cameras" }));
      return;
    }
    void run();
  };

  /** Load what is missing. After a failure the next order tries again. */
  async function run() {
    if (running || paused) return;
    running = true;
    try {
      if (!model) known(model = await opened());
      while (!paused && wanted && missing(model, wanted)) await load(model, wanted);
      if (!paused && wanted) source.abort(); // a request for more than is wanted now
    } catch (e) {
      if ((e as Error).name === "AbortError") {
        if (!paused) setTimeout(run); // resumed before the request had ended
      } else {
        if (!(e instanceof Lost)) source.forget(); // what has arrived is of no use
        port.postMessage({ type: "failed", message: (e as Error).message });
      }
    } finally {
      running = false;
    }
  }

  /** Whether a chunk that a cut needs has not been read. */
  const missing = (model: Model, kept: Kept) => model.ratio < kept.ratio;

  async function opened(): Promise<Model> {
    const length = HEAD + headerBytes(await source.read(0, HEAD, HEAD));
    const raw = await source.read(0, length, length);
    const header = await readHeader(raw.subarray(0, HEAD), raw.subarray(HEAD));
    if (source.size !== undefined && source.size !== header.size) {
      throw new Error(`found ${source.size} bytes, expected ${header.size} as its header says; get the file again`);
    }
    source.size = header.size;
    const made = new Model(header);
    port.postMessage({ type: "opened", header });
    return made;
  }

  async function load(model: Model, kept: Kept) {
    const { chunks, start } = model.header, next = chunks.findIndex((chunk) => chunk.ratio > model.ratio);
    let from = start, until = start;
    for (const [i, chunk] of chunks.entries()) {
      if (i === next) from = until;
      until += chunk.bytes;
      if (i >= next && chunk.ratio >= kept.ratio) break;
    }
    const chunk = chunks[next]!, what = `the stage of ${100 * chunk.ratio} %`;
    const body = await source.read(from, chunk.bytes, until);
    const first = model.ratio ? countAt(model.ratio, model.header.count) : 0;
    if (crc32(body) !== chunk.crc32) {
      throw new Error(`${what} is damaged, or the file has changed while it was read; load the page again`);
    }
    let values: Float32Array;
    try {
      values = model.fill(body);
    } catch (e) {
      throw new Error(`${what} is damaged (${(e as Error).message}); get the file again`);
    }
    if (values.length) port.postMessage({ type: "shN", first, values }, [values.buffer]);
    cut(model, wanted!);
  }

  function cut(model: Model, { count, ratio }: Kept) {
    const last = !missing(model, { count, ratio });
    const kept = last ? { count, ratio } : { count: countAt(model.ratio, model.header.count), ratio: model.ratio };
    const made = { ...kept, ...model.cut(kept.count, kept.ratio) };
    const arrays = [made.means, made.quats, made.scales, made.opacities, made.sh0];
    port.postMessage({ type: "cut", cut: made, last }, arrays.map((array) => array.buffer));
  }

  /** Read the part behind the chunks: cameras to look from. */
  async function cameras() {
    const { size, last } = (await first).header, raw = await source.apart(size - last.bytes, last.bytes);
    if (crc32(raw) !== last.crc32) throw new Error("the part behind the stages is damaged; get the file again");
    port.postMessage({ type: "cameras", rows: (await inflated(raw)).cameras });
  }

  return () => {
    paused = true;
    source?.abort(); // none yet, if no order has come
  };
}
