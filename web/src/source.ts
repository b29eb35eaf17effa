/** Reading a file from the front: by HTTP ranges where the server has them, and on after a lost connection. */

const FIRST = 1 << 16; // bytes of the first request, which has the header and often the first stage
const RETRIES = [500, 1000, 2000]; // milliseconds to wait before another attempt

/** A failure that another attempt may cure: no connection, or a server that is busy. */
export class Lost extends Error {}

export class Source {
  /** Bytes of the whole file, once the server has said so. */
  size?: number;
  #at = 0; // where the bytes that are kept begin
  #waiting: Uint8Array[] = [];
  #stream?: ReadableStreamDefaultReader<Uint8Array>;
  #skip = 0; // bytes of the answer that have arrived before
  #gained = 0; // bytes of the answer
  #tag: string | null = null;
  #abort = new AbortController();

  /**
   * url: an http(s), blob or data URL, or a stream of the file's bytes.
   * progress: called with the number of bytes that have arrived.
   */
  constructor(private url: string | ReadableStream<Uint8Array>, private progress: (loaded: number) => void) {
    if (typeof url !== "string") this.#stream = url.getReader();
  }

  /** Number of bytes that have arrived. */
  get loaded(): number {
    return this.#waiting.reduce((sum, piece) => sum + piece.length, this.#at);
  }

  /**
   * Return `length` bytes from an offset, and ask for no more than those up to `until`. They stay until one behind them
   * is read, so that the same may be read again.
   */
  async read(offset: number, length: number, until: number): Promise<Uint8Array> {
    while (this.loaded < offset + length) await this.#insist(() => this.#more(until), this.#abort.signal);
    while (this.#at < offset) {
      const piece = this.#waiting.shift()!, gone = Math.min(piece.length, offset - this.#at);
      if (gone < piece.length) this.#waiting.unshift(piece.subarray(gone));
      this.#at += gone;
    }
    const out = new Uint8Array(length);
    let filled = 0;
    for (const piece of this.#waiting) {
      out.set(piece.subarray(0, length - filled), filled);
      filled += Math.min(piece.length, length - filled);
    }
    return out;
  }

  /** Return bytes from somewhere else in the file, by a request of their own. */
  async apart(offset: number, length: number): Promise<Uint8Array> {
    if (typeof this.url !== "string") throw new Error("bytes of a stream are read from the front only");
    return this.#insist(async () => {
      const answer = await this.#asked(offset, offset + length);
      const found = new Uint8Array(await answer.arrayBuffer().catch((e) => { throw lost(e, "the connection was lost"); }));
      return answer.status === 200 ? found.subarray(offset, offset + length) : found;
    });
  }

  /** Let go of the bytes that are kept, so that the next read() asks for them anew. */
  forget(): void {
    if (typeof this.url !== "string") return; // they come once
    this.abort();
    [this.#waiting, this.#stream] = [[], undefined];
  }

  /** End the request that is under way; what has arrived stays, and another read() goes on behind it. */
  abort(): void {
    this.#abort.abort(new DOMException("loading was stopped", "AbortError"));
    this.#abort = new AbortController();
  }

  /** Do something that a lost connection may interrupt, and do it again after a while. */
  async #insist<T>(act: () => Promise<T>, signal?: AbortSignal): Promise<T> {
    for (const wait of RETRIES) {
      try {
        return await act();
      } catch (e) {
        if (!(e instanceof Lost) || typeof this.url !== "string") throw e;
        await sleep(wait, signal);
      }
    }
    return act();
  }

  async #more(until: number): Promise<void> {
    if (!this.#stream) {
      const from = this.loaded, answer = await this.#asked(from, this.size ? until : Math.max(until, FIRST),
        this.#abort.signal);
      this.#stream = answer.body!.getReader();
      this.#skip = answer.status === 200 ? from : 0; // a server without ranges sends all of it again
      this.#gained = 0;
    }
    let piece: Uint8Array | undefined;
    try {
      piece = (await this.#stream.read()).value;
    } catch (e) {
      if (typeof this.url === "string") this.#stream = undefined;
      throw lost(e, `the connection was lost after ${bytes(this.loaded)}`);
    }
    if (piece) {
      const skipped = Math.min(this.#skip, piece.length);
      this.#skip -= skipped;
      if (skipped < piece.length) this.#waiting.push(piece.subarray(skipped));
      this.#gained += piece.length;
      this.progress(this.loaded);
      return;
    }
    if (typeof this.url === "string") this.#stream = undefined;
    if (typeof this.url !== "string" || this.loaded >= (this.size ??= this.loaded)) {
      throw new Error(`the file ends after ${bytes(this.loaded)}; get it again`);
    }
    if (!this.#gained) throw new Lost("the server sends nothing");
  }

  /** Ask for the bytes from one offset up to another. */
  async #asked(from: number, to: number, signal?: AbortSignal): Promise<Response> {
    const url = this.url as string;
    if (url.startsWith("file:")) {
      throw new Error("a page may not read files of a disk: `flexgs serve FOLDER` shows it, and `flexgs cut RUN --html` " +
        "writes one that opens from a disk");
    }
    let answer: Response;
    try {
      answer = await fetch(url, { signal, headers: { Range: `bytes=${from}-${to - 1}` } });
    } catch (e) {
      throw lost(e, "no connection, or a server that allows no page of another origin (CORS)");
    }
    const { status, headers } = answer;
    if (status >= 500 || status === 408 || status === 429) throw new Lost(`the server says ${status}`);
    if (status !== 200 && status !== 206) throw new Error(`the server says ${status} ${answer.statusText}`.trimEnd());
    const length = status === 200 ? headers.get("Content-Length") : headers.get("Content-Range")?.split("/")[1];
    const size = Number(length || NaN), tag = headers.get("ETag");
    const changed = (size && this.size && size !== this.size) || (tag && this.#tag && tag !== this.#tag);
    if (changed) throw new Error("the file has changed while it was read; load the page again");
    if (size && !headers.get("Content-Encoding")) this.size = size;
    this.#tag ??= tag;
    return answer;
  }
}

const bytes = (count: number): string => `${count.toLocaleString("en")} bytes`;

/** An error of fetch as one that another attempt may cure, unless it is an abort. */
function lost(error: unknown, message: string): Error {
  return error instanceof Error && error.name === "AbortError" ? error : new Lost(message);
}

function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => reject(signal.reason));
  });
}
