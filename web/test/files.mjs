// Packed models that Python has written, and what it cuts from them: FLEXGS_DATA names their folder, which
// tests/test_web.py fills; by default it is data/, which has two small ones.
import { readdirSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { once } from "node:events";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const folder = process.env.FLEXGS_DATA ?? fileURLToPath(new URL("data", import.meta.url));

/** Names of the models, each with its bytes and with the cuts: { ratio, count, means, ... } as Python has them. */
export const MODELS = readdirSync(folder).filter((name) => name.endsWith(".json")).map((name) => {
  const about = JSON.parse(readFileSync(join(folder, name)));
  const values = readFileSync(join(folder, name.replace("json", "bin")));
  let at = values.byteOffset;
  const cuts = about.cuts.map(({ ratio, count }) => ({ ratio, count, ...Object.fromEntries(
    about.attributes.map(([attribute, width]) => {
      const found = new Float32Array(values.buffer.slice(at, (at += 4 * count * width)));
      return [attribute, found];
    })) }));
  return { name: name.replace(".json", ""), raw: readFileSync(join(folder, name.replace("json", "fgs"))), cuts };
});

/** Serve a file; behave(request, response, bytes) may do it in another way. Returns { url, asked, close }. */
export async function served(raw, behave = range) {
  const asked = [];
  const server = createServer((request, response) => {
    asked.push(request.headers.range);
    behave(request, response, raw, asked.length);
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  const close = () => new Promise((done) => { server.close(done); server.closeAllConnections(); });
  return { url: `http://127.0.0.1:${server.address().port}/model.fgs`, asked, close };
}

/** Answer as a server that knows ranges. */
export function range(request, response, raw, _count, send = (bytes) => response.end(bytes)) {
  const [, first, last] = /bytes=(\d+)-(\d+)/.exec(request.headers.range).map(Number);
  const end = Math.min(last + 1, raw.length);
  response.writeHead(206, { "Content-Range": `bytes ${first}-${end - 1}/${raw.length}`, ETag: '"a"',
    "Content-Length": end - first });
  send(raw.subarray(first, end));
}
