/**
 * <flexgs-view src="model.fgs">: shows a packed model, the coarsest stage first, with a slider for how much of it is
 * kept, and beside the photographs that a manifest names. What stands between the tags is shown until then.
 */

import { Model, type Budget, type Camera, type Cut } from "./index.js";
import { Orbit, unit } from "./orbit.js";
import { LOST, Renderer, type View } from "./renderer.js";
import { PANEL } from "./panel.js";

/** The file that `flexgs cut RUN --web FOLDER` writes beside the model. */
export interface Manifest {
  title: string;
  model: string;
  poster: string;
  /** Colour behind the model, r g b from 0 to 1. */
  background: [number, number, number];
  near: number;
  up: [number, number, number];
  /** Test views, the one to begin with first. */
  views: Photograph[];
}

/** A camera, and its photograph if there is one. */
export interface Photograph extends Camera {
  photo?: string;
}

/**
 * What a message is about: each stays until there is another one about the same, or nothing to be said of it any more,
 * and those that pass until somebody does something. Loading that has stopped can be tried again.
 */
type Subject = "picture" | "source" | "loading" | (typeof PASSING)[number];
const PASSING = ["manifest", "cameras", "budget", "photograph"] as const;

declare const SORTER: string; // the second worker's program, which build.mjs writes here

const LEAST = -3; // the slider goes from 10^-3 to 1
const TURN = 0.006, KEY = 0.08; // radians by pixel, and by press of a key

export class FlexgsView extends HTMLElement {
  static readonly observedAttributes = ["src", "manifest", "budget"];
  /** The model that is shown: budgets, progress and cuts. */
  model?: Model;
  readonly #root = this.attachShadow({ mode: "open" });
  readonly #orbit = new Orbit();
  #sorter?: Worker;
  #renderer?: Renderer;
  #manifest?: Manifest;
  #lens = { width: 16, height: 9, fx: 10, fy: 10, cx: 8, cy: 4.5 };
  #home?: Camera;
  #compared = -1; // the view whose photograph is shown
  #latest?: Cut; // that has come, and is drawn once it has been sorted
  #sorting?: { cut: Cut; viewmat: string }; // what the second worker has been asked for
  #drawn?: Cut;
  #frame = 0;
  #last = 0; // time of the frame before, while somebody moves
  readonly #pointers = new Map<number, PointerEvent>(); // that are down
  readonly #said = new Map<Subject, string>();
  #touched = false;
  #pieces?: ReadableStreamDefaultController<Uint8Array>;
  #reopening = false;

  constructor() {
    super();
    this.#root.innerHTML = PANEL;
    this.#listen();
    new ResizeObserver(() => this.#draw()).observe(this);
  }

  connectedCallback(): void {
    if (!this.#begin()) return;
    const program = URL.createObjectURL(new Blob([SORTER], { type: "text/javascript" }));
    this.#sorter = new Worker(program);
    this.#sorter.onmessage = ({ data }) => this.#sorted(data);
    void this.#open();
  }

  disconnectedCallback(): void {
    this.model?.close();
    if (this.#sorter) this.#sorter.onmessage = null; // an order that is on its way
    this.#sorter?.terminate();
    this.#renderer?.clear();
    this.#compare(-1);
    this.#pointers.clear();
    for (const subject of this.#said.keys()) if (subject !== "picture") this.#say(subject);
    this.removeAttribute("drawn");
    this.#find("#about").textContent = "loading";
    this.#find<HTMLElement>("#bar").style.width = "0";
    const compare = this.#find<HTMLButtonElement>("#compare");
    compare.hidden = false; // its place is kept until it is known whether there are photographs
    compare.disabled = true;
    this.model = this.#manifest = this.#home = this.#latest = this.#drawn = this.#sorter = this.#sorting = undefined;
  }

  attributeChangedCallback(name: string): void {
    if (!this.#sorter || this.#reopening) return; // connectedCallback() reads them all
    if (name === "budget" && this.model) return this.#budget(this.getAttribute("budget") ?? "auto");
    this.#reopening = true;
    queueMicrotask(() => { // once, however many of them change together
      this.#reopening = false;
      if (!this.#sorter) return;
      this.disconnectedCallback();
      this.connectedCallback();
    });
  }

  /** Take the next piece of the file from an element that holds it in base64, for pages that are one file. */
  push(holder: Element | null): void {
    if (holder) this.#pieces?.enqueue(Uint8Array.from(atob(holder.textContent!), (c) => c.charCodeAt(0)));
    holder?.remove();
  }

  /** Have the canvas drawn on; false, and a message, where the browser cannot. */
  #begin(): boolean {
    try {
      this.#renderer ??= new Renderer(this.#find("canvas"));
      this.#say("picture");
    } catch (e) {
      this.#say("picture", (e as Error).message);
    }
    return Boolean(this.#renderer);
  }

  async #open(): Promise<void> {
    const manifest = this.getAttribute("manifest"), src = this.getAttribute("src");
    const budget = this.getAttribute("budget") ?? "auto";
    let source: string | ReadableStream<Uint8Array> | null = src;
    if (!src && !manifest) return this.#say("source", "expected <flexgs-view src=\"NAME.fgs\">");
    if (!src) source = new ReadableStream({ start: (pieces) => { this.#pieces = pieces; } });
    let model: Model;
    try {
      model = this.model = new Model(source!, { budget });
    } catch (e) {
      return this.#say("source", (e as Error).message);
    }
    model.on("progress", ({ loaded, total }) => {
      this.#say("loading");
      this.#find<HTMLElement>("#bar").style.width = `${100 * (loaded / total || 0)}%`;
    }).on("failed", (error) => {
      this.#say("loading", model.cut ? `${error.message}. What has been loaded stays.` : error.message);
    }).on("cut", (cut) => {
      if (cut.last) {
        this.#say("loading");
        this.#find<HTMLElement>("#bar").style.width = "0";
      }
      this.#latest = cut;
      this.#sorter!.postMessage({ means: cut.means });
      if (ready) this.#sort();
      this.#label();
    });
    let ready = false;
    try {
      const found = manifest ? await described(manifest) : undefined;
      if (model !== this.model) return; // the attributes have changed, or the element has been removed
      this.#manifest = found;
    } catch (e) {
      if (model !== this.model) return;
      this.#say("manifest", (e as Error).message);
    }
    if (this.#manifest) this.#orbit.up = this.#manifest.up;
    const cameras = this.#manifest?.views ?? (src ? await model.cameras().catch((e: Error) => {
      if (model === this.model) this.#say("cameras", `${e.message}; the model is seen from where most of it is in sight`);
      return [];
    }) : []);
    if (!model.cut) await new Promise((resolve) => model.addEventListener("cut", resolve, { once: true }));
    if (model !== this.model) return;
    this.#home = cameras[0] ?? around(model.cut!);
    if (!this.#manifest) this.#orbit.up = unit([-this.#home.viewmat[4]!, -this.#home.viewmat[5]!, -this.#home.viewmat[6]!]);
    const compare = this.#find<HTMLButtonElement>("#compare");
    compare.hidden = compare.disabled = !this.#photographs.length;
    this.#look(this.#home);
    ready = true;
    this.#sort();
  }

  get #photographs(): Photograph[] {
    return this.#manifest?.views.filter((view) => view.photo) ?? [];
  }

  #find<E extends Element = HTMLCanvasElement>(selector: string): E {
    return this.#root.querySelector<E>(selector)!;
  }

  /** Show a message about something, beside those about others; without text, take it away. */
  #say(about: Subject, text?: string): void {
    if (text) this.#said.set(about, text);
    else this.#said.delete(about);
    this.#find<HTMLElement>("#message").hidden = !this.#said.size;
    this.#find("#text").textContent = [...this.#said.values()].join("\n");
    this.#find<HTMLElement>("#again").hidden = !this.#said.has("loading");
  }

  /** Take away what has been read by the time that somebody does something. */
  #acted(): void {
    for (const subject of PASSING) this.#say(subject);
  }

  /** Stand where a camera stands. */
  #look(camera: Camera): void {
    this.#lens = camera;
    this.#orbit.place(camera.viewmat, depthOf(this.model!.cut!, camera));
    this.#moved();
  }

  /** The view in pixels of the canvas: all of the photograph's frame is inside. */
  get #view(): View {
    const { width, height } = this.#find("canvas"), lens = this.#lens;
    const scale = Math.min(width / lens.width, height / lens.height);
    return { viewmat: this.#orbit.viewmat, fx: scale * lens.fx, fy: scale * lens.fy,
      cx: width / 2 + scale * (lens.cx - lens.width / 2), cy: height / 2 + scale * (lens.cy - lens.height / 2),
      near: this.#manifest?.near ?? this.#orbit.distance / 1000 };
  }

  #moved(): void {
    this.#sort();
    this.#draw();
  }

  /** Have the latest cut sorted for the view of now, unless the second worker is at work: then when it is done. */
  #sort(): void {
    if (!this.#latest || this.#sorting || !this.#home) return;
    const { viewmat, near } = this.#view;
    this.#sorting = { cut: this.#latest, viewmat: String(viewmat) };
    this.#sorter!.postMessage({ viewmat, near });
  }

  #sorted(order: Uint32Array): void {
    const { cut, viewmat } = this.#sorting!;
    this.#sorting = undefined;
    if (!this.#renderer) return; // the browser has taken it away
    if (cut !== this.#drawn) {
      this.#renderer.show(cut);
      this.#drawn = cut;
    }
    this.#renderer.order(order);
    this.#draw();
    if (viewmat !== String(this.#view.viewmat) || cut !== this.#latest) this.#sort();
  }

  #draw(): void {
    this.#frame ||= requestAnimationFrame((now) => {
      this.#frame = 0;
      const canvas = this.#find("canvas"), scale = Math.min(devicePixelRatio, 2);
      const [width, height] = [Math.round(this.clientWidth * scale), Math.round(this.clientHeight * scale)];
      if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
      if (this.#renderer && this.#drawn) {
        this.#renderer.draw(this.#view, this.#manifest?.background ?? [0, 0, 0]);
        this.setAttribute("drawn", String(this.#drawn.ratio));
      }
      const moving = this.#pointers.size > 0;
      if (moving && this.#last) this.model?.frame(now - this.#last);
      this.#last = moving ? now : 0;
      if (moving) this.#draw();
    });
  }

  /** Write what is shown: how much of the model, how many Gaussians, and the bytes that they take. */
  #label(): void {
    const { header, cut } = this.model!;
    if (!header || !cut) return;
    let end = header.start;
    for (const chunk of header.chunks) {
      end += chunk.bytes;
      if (chunk.ratio >= cut.count / header.count) break;
    }
    const percent = Number((100 * cut.ratio).toPrecision(cut.ratio < 0.1 ? 2 : 3));
    this.#find("#about").textContent =
      `${percent} % · ${cut.count.toLocaleString("en")} Gaussians · ${size(end)}`;
    const slider = this.#find<HTMLInputElement>("#ratio");
    if (this.#auto || cut.last) slider.value = String(1 - Math.log10(cut.ratio) / LEAST);
    slider.ariaValueText = `${percent} %`;
    this.#find("#auto").ariaPressed = String(this.#auto);
  }

  get #auto(): boolean {
    return this.model?.budget === "auto";
  }

  #budget(budget: Budget): void {
    try {
      this.model?.setBudget(budget);
      this.#acted();
      this.#label();
    } catch (e) {
      this.#say("budget", (e as Error).message);
    }
  }

  /** Show the photograph of a test view on the right half, from where it was taken; -1 shows none. */
  #compare(index: number): void {
    const views = this.#photographs, view = views[index];
    this.#compared = view ? index : -1;
    this.toggleAttribute("comparing", Boolean(view));
    this.#find("#compare").ariaPressed = String(Boolean(view));
    this.#find("#which").textContent = view ? `model | photograph ${index + 1} of ${views.length}` : "";
    const photo = this.#find<HTMLImageElement>("#photo");
    photo.hidden = true; // the one before, until this one is there
    photo.onload = photo.onerror = null;
    if (!view) return;
    this.#acted();
    photo.onload = () => { photo.hidden = false; };
    photo.onerror = () => {
      this.#compare(-1);
      this.#say("photograph", `${view.photo}: the photograph cannot be loaded`);
    };
    photo.src = new URL(view.photo!, this.#base).href;
    this.#look(view);
  }

  get #base(): string {
    const manifest = this.getAttribute("manifest") ?? "";
    return manifest.startsWith("{") ? document.baseURI : new URL(manifest, document.baseURI).href;
  }

  #listen(): void {
    const canvas = this.#find("canvas"), pointers = this.#pointers;
    canvas.addEventListener("webglcontextlost", (event) => {
      event.preventDefault(); // or it would not come back
      this.#renderer = this.#drawn = undefined;
      this.removeAttribute("drawn");
      this.#say("picture", LOST);
    });
    canvas.addEventListener("webglcontextrestored", () => {
      if (!this.isConnected) return;
      if (!this.#sorter) this.connectedCallback();
      else if (this.#begin()) this.#sort();
    });
    const moved = () => {
      this.#acted();
      if (!this.#touched) this.toggleAttribute("touched", this.#touched = true);
      if (this.#compared >= 0) this.#compare(-1);
      this.#moved();
    };
    canvas.onpointerdown = (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
      this.#draw();
    };
    canvas.onpointermove = (event) => {
      const before = pointers.get(event.pointerId);
      if (!before || !this.#home) return;
      const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
      const other = [...pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
      const perPixel = 1 / Math.max(1, this.#view.fy / Math.min(devicePixelRatio, 2));
      if (other) {
        const apart = (a: PointerEvent) => Math.hypot(a.clientX - other.clientX, a.clientY - other.clientY) || 1;
        this.#orbit.zoom(apart(before) / apart(event));
        this.#orbit.pan((-dx / 2) * perPixel, (-dy / 2) * perPixel);
      } else if (event.buttons & 2 || event.shiftKey) {
        this.#orbit.pan(-dx * perPixel, -dy * perPixel);
      } else {
        this.#orbit.turn(-TURN * dx, TURN * dy);
      }
      pointers.set(event.pointerId, event);
      if (dx || dy) moved();
    };
    canvas.onpointerup = canvas.onpointercancel = (event) => { pointers.delete(event.pointerId); };
    canvas.oncontextmenu = (event) => event.preventDefault();
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.#orbit.zoom(1.001 ** event.deltaY);
      moved();
    }, { passive: false });

    const press = (selector: string, act: () => void) => { this.#find<HTMLElement>(selector).onclick = act; };
    const reset = () => {
      this.#compare(-1);
      if (this.#home) this.#look(this.#home);
    };
    const full = () => document.fullscreenElement ? document.exitFullscreen() : this.requestFullscreen();
    const compare = () => this.#compare(this.#compared < 0 ? 0 : -1);
    const step = (by: number) => {
      const n = this.#photographs.length;
      if (n) this.#compare((Math.max(0, this.#compared) + by + n) % n);
    };
    press("#reset", reset);
    press("#full", full);
    press("#compare", compare);
    press("#next", () => step(1));
    press("#before", () => step(-1));
    press("#auto", () => this.#budget(this.#auto ? this.model?.cut?.ratio ?? 1 : "auto"));
    press("#again", () => {
      this.#say("loading");
      this.model?.resume();
    });
    this.#find<HTMLElement>("#full").hidden = !document.fullscreenEnabled;
    const slider = this.#find<HTMLInputElement>("#ratio");
    slider.oninput = () => this.#budget(10 ** (LEAST * (1 - Number(slider.value))));

    const split = this.#find<HTMLInputElement>("#split");
    split.oninput = () => { // 32 pixels are the handle's
      this.style.setProperty("--split", `calc(16px + ${Number(split.value) / 100} * (100% - 32px))`);
    };

    const keys: Record<string, () => void> = {
      ArrowLeft: () => this.#orbit.turn(KEY, 0), ArrowRight: () => this.#orbit.turn(-KEY, 0),
      ArrowUp: () => this.#orbit.turn(0, KEY), ArrowDown: () => this.#orbit.turn(0, -KEY),
      "+": () => this.#orbit.zoom(0.9), "=": () => this.#orbit.zoom(0.9), "-": () => this.#orbit.zoom(1 / 0.9),
    };
    const commands: Record<string, () => void> = {
      r: reset, f: full, c: compare, n: () => step(1), p: () => step(-1), a: () => this.#find<HTMLElement>("#auto").click(),
    };
    canvas.onkeydown = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !this.#home) return;
      const move = keys[event.key], command = commands[event.key.toLowerCase()];
      if (!move && !command) return;
      event.preventDefault();
      command?.();
      move?.();
      if (move) moved();
    };
  }
}

const size = (bytes: number): string => bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;

/** The manifest at a URL, or the one that the attribute itself holds. */
async function described(url: string): Promise<Manifest> {
  if (url.startsWith("{")) return JSON.parse(url);
  const answer = await fetch(url).catch(() => { throw new Error(`${url}: no connection`); });
  if (!answer.ok) throw new Error(`${url}: the server says ${answer.status}`);
  const found = await answer.json().catch(() => undefined);
  if (!Array.isArray(found?.views) || !found.up) throw new Error(`${url}: no manifest of \`flexgs cut --web\``);
  return found;
}

const median = (values: number[] | Float32Array): number => values.sort((a: any, b: any) => a - b)[values.length >> 1] ?? 0;

/** The median depth of the Gaussians in the middle of a camera's frame. */
function depthOf({ means }: Cut, { viewmat: m, fx, fy, width, height }: Camera): number {
  const depths: number[] = [];
  for (let i = 0; i < means.length; i += 3) {
    const [x, y, z] = [0, 4, 8].map((r) =>
      m[r]! * means[i]! + m[r + 1]! * means[i + 1]! + m[r + 2]! * means[i + 2]! + m[r + 3]!) as [number, number, number];
    if (z > 0 && Math.abs((fx * x) / z) < width / 4 && Math.abs((fy * y) / z) < height / 4) depths.push(z);
  }
  return median(depths) || 1;
}

/** A camera from which half of the Gaussians are seen, for a model that has none; -y is up. */
function around({ means }: Cut): Camera {
  const axis = (i: number) => means.filter((_, at) => at % 3 === i);
  const middle = [0, 1, 2].map((i) => median(axis(i)));
  const away = 2.2 * (median(axis(0).map((_, i) => Math.hypot(...middle.map((m, j) => means[3 * i + j]! - m)))) || 1);
  return { width: 640, height: 480, fx: 520, fy: 520, cx: 320, cy: 240,
    viewmat: [1, 0, 0, -middle[0]!, 0, 1, 0, -middle[1]!, 0, 0, 1, away - middle[2]!, 0, 0, 0, 1] };
}

if (!customElements.get("flexgs-view")) customElements.define("flexgs-view", FlexgsView);

export * from "./index.js";
