/**
 * flexgs: opens a packed 3D Gaussian Splatting model (.fgs) coarse first, refines it while it loads, and cuts it to
 * any budget in the browser. It draws nothing itself: `flexgs/view` does, and so does any renderer that takes a Cut.
 */

import { paceOf, resolve, type Budget, type Kept, type Pace } from "./budget.js";
import { serve, type Made, type Order, type Port, type Report } from "./engine.js";
import type { Header } from "./header.js";
import { harmonics, type Attributes } from "./model.js";

export type { Attributes, Budget, Header, Kept };
export { plyOf } from "./ply.js";
export { harmonics };

/** Gaussians for a budget: float32, in the parametrisation of 3DGS's PLY files, x right, y down, z forward. */
export interface Cut extends Attributes, Kept {
  /** Spherical harmonics above degree 0, [count, K, 3], K = 0, 3, 8 or 15; shared by all cuts, not to be written to. */
  shN: Float32Array;
  shDegree: number;
  /** Where (0, 0, 0) of the positions lies in the capture's own coordinates. */
  origin: [number, number, number];
  /** Whether this is what the budget asks for, rather than a coarser cut on the way there. */
  last: boolean;
}

/** A camera that the model is worth looking at from: x right, y down, z forward. */
export interface Camera {
  width: number;
  height: number;
  /** World to camera, [4, 4] row by row. */
  viewmat: number[];
  /** Focal lengths and principal point in pixels. */
  fx: number;
  fy: number;
  cx: number;
  cy: number;
}

export interface Options {
  /** The budget to begin with. Default: all of the model. */
  budget?: Budget;
  /** Ends everything when it is aborted, as close() does. */
  signal?: AbortSignal;
}

/** Events of a Model, and what their `detail` is. */
export interface Events {
  /** There is something new to show. */
  cut: Cut;
  /** More bytes of the file have arrived. */
  progress: { loaded: number; total: number };
  /** Loading has stopped; what was shown stays. resume() tries again, and so does a budget that needs more. */
  failed: Error;
}

declare const WORKER: string | undefined; // the worker's program, which build.mjs writes here

/** A model that is being loaded. */
export class Model extends EventTarget {
  /** What the file holds, once it is known. */
  header?: Header;
  /** The latest cut. */
  cut?: Cut;
  /** Resolves once the header has been read and checked; rejects if that fails. */
  readonly opened: Promise<Model>;
  readonly #post: (order: Order, transfer?: Transferable[]) => void;
  readonly #end: () => void;
  readonly #name: string;
  #budget: Budget;
  #pace?: Pace;
  #ratio = 1; // that the pace has chosen
  #shN = new Float32Array(0);
  #closed = false;
  #opening!: { resolve: (model: Model) => void; reject: (error: Error) => void };
  #found?: Promise<Camera[]>;
  #cameras?: { resolve: (cameras: Camera[]) => void; reject: (error: Error) => void };

  constructor(source: string | URL | ReadableStream<Uint8Array>, { budget = 1, signal }: Options = {}) {
    super();
    const stream = source instanceof ReadableStream;
    const url = stream ? source : new URL(source, globalThis.document?.baseURI).href;
    this.#name = stream ? "the model" : (url as string).startsWith("data:") ? "data" : url as string;
    this.#budget = budget;
    this.#pace = paceOf(budget);
    this.opened = new Promise((resolve, reject) => { this.#opening = { resolve, reject }; });
    this.opened.catch(() => {}); // "failed" says it too
    const heard = ({ data: report }: MessageEvent<Report>) => {
      if (this.#closed) return; // it was on its way
      if (report.type === "opened") {
        this.header = report.header;
        this.#shN = new Float32Array(3 * harmonics(report.header.shDegree) * report.header.count);
        this.#begin();
      } else if (report.type === "progress") {
        this.#tell("progress", { loaded: report.loaded, total: this.header?.size ?? NaN });
      } else if (report.type === "shN") {
        this.#shN.set(report.values, 3 * harmonics(this.header!.shDegree) * report.first);
      } else if (report.type === "cut") {
        this.cut = this.#finished(report.cut, report.last);
        this.#tell("cut", this.cut);
      } else if (report.type === "cameras") {
        this.#cameras?.resolve(report.rows.map(cameraOf));
      } else {
        const error = new Error(`${this.#name}: ${report.message}`);
        if (report.of) return this.#cameras?.reject(error);
        this.#fail(error);
      }
    };
    if (typeof Worker === "undefined" || typeof WORKER === "undefined") { // Node.js
      const { port1, port2 } = new MessageChannel(), stop = serve(port2 as unknown as Port);
      port1.onmessage = heard;
      this.#post = (order, transfer = []) => port1.postMessage(order, transfer);
      this.#end = () => {
        stop();
        port1.close();
      };
    } else {
      const program = URL.createObjectURL(new Blob([WORKER], { type: "text/javascript" }));
      const worker = new Worker(program);
      worker.onmessage = heard;
      worker.onerror = (e) => heard({ data: { type: "failed", message: `the worker failed: ${e.message ||
        "does the page's Content-Security-Policy lack worker-src blob: ?"}` } } as MessageEvent<Report>);
      this.#post = (order, transfer = []) => worker.postMessage(order, transfer);
      this.#end = () => {
        worker.terminate();
        URL.revokeObjectURL(program);
      };
    }
    this.#post({ type: "open", url }, stream ? [source as unknown as Transferable] : []);
    signal?.addEventListener("abort", () => this.close());
    if (signal?.aborted) this.close();
  }

  /** Call a function at each event of a kind, with what the event is about. */
  on<K extends keyof Events>(kind: K, heard: (detail: Events[K]) => void): this {
    this.addEventListener(kind, (event) => heard((event as CustomEvent).detail));
    return this;
  }

  /** The budget as it was set. */
  get budget(): Budget {
    return this.#budget;
  }

  /**
   * Change the budget: "5%", a ratio up to 1, "500k" or a number of Gaussians, "2MB" of the file, "16ms" per frame,
   * "auto" (60 frames a second, or else 30), or a device such as "quest". What it needs is loaded, and cuts come
   * as events. An Error if it is none of these.
   */
  setBudget(budget: Budget): void {
    const pace = paceOf(budget);
    if (this.header && !pace) resolve(budget, this.header);
    this.#ratio = this.cut?.ratio ?? 1;
    [this.#budget, this.#pace] = [budget, pace];
    if (this.header) this.#want();
  }

  /** Take note of how long a frame took, in milliseconds, which moves the cut of a budget in ms or "auto". */
  frame(ms: number): void {
    if (!this.#pace || !this.cut) return;
    const ratio = this.#pace.next(ms, this.cut.ratio);
    if (ratio === this.cut.ratio || ratio === this.#ratio) return;
    this.#ratio = ratio;
    this.#want();
  }

  /** Stop loading; what has arrived stays. */
  pause(): void {
    this.#post({ type: "pause" });
  }

  /** Go on loading after pause() or "failed". */
  resume(): void {
    this.#post({ type: "resume" });
    if (this.header && !this.cut) this.#begin(); // the budget may have been at fault
  }

  /** Read the cameras that the file stores, which stand behind all stages; there may be none. */
  cameras(): Promise<Camera[]> {
    return this.#found ??= new Promise<Camera[]>((resolve, reject) => {
      this.#cameras = { resolve, reject };
      if (this.#closed) reject(ended());
      else this.#post({ type: "cameras" });
    }).catch((error) => {
      this.#found = undefined; // the next call tries again
      throw error;
    });
  }

  /** End all work and free its memory; what has been promised is rejected with an AbortError. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#end();
    this.#opening.reject(ended());
    this.#cameras?.reject(ended());
  }

  /** Ask for what the budget needs, which is known once the header is. */
  #begin(): void {
    try {
      this.#want();
      this.#opening.resolve(this);
    } catch (e) {
      this.#fail(e as Error);
    }
  }

  #fail(error: Error): void {
    this.#opening.reject(error);
    this.#tell("failed", error);
  }

  #want(): void {
    this.#post({ type: "budget", kept: resolve(this.#pace ? this.#ratio : this.#budget, this.header!) });
  }

  #finished(made: Made, last: boolean): Cut {
    const { shDegree, origin } = this.header!;
    return { ...made, last, shDegree, origin, shN: this.#shN.subarray(0, 3 * harmonics(shDegree) * made.count) };
  }

  #tell<K extends keyof Events>(kind: K, detail: Events[K]): void {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}

/** Open a packed model; resolves once its header is read, and rejects with a message if it is none. */
export async function open(source: string | URL | ReadableStream<Uint8Array>, options?: Options): Promise<Model> {
  const model = new Model(source, options);
  return model.opened.catch((error) => {
    model.close();
    throw error;
  });
}

const ended = (): Error => new DOMException("the model was closed", "AbortError");

function cameraOf(row: number[]): Camera {
  const [width, height, ...rest] = row as [number, number, ...number[]], K = rest.slice(16);
  return { width, height, viewmat: rest.slice(0, 16), fx: K[0]!, fy: K[4]!, cx: K[2]!, cy: K[5]! };
}
