import assert from "node:assert/strict";
import { after, test } from "node:test";
import { MODELS, range, served } from "./files.mjs";
import { source } from "./source.mjs";

const { open, Model, plyOf } = await source("index");
const { decompress } = await source("lzma");
const { Pace, resolve } = await source("budget");
const { readHeader, headerBytes, HEAD } = await source("header");

const opened = [];
after(() => Promise.all(opened.map((close) => close())));

/** A model from a server, with a list of the cuts that have come. */
async function from(raw, options, behave) {
  const server = await served(raw, behave);
  opened.push(server.close);
  const model = new Model(server.url, options), cuts = [];
  opened.push(() => model.close());
  model.on("cut", (cut) => cuts.push(cut));
  return { model, cuts, server };
}
const until = (model, kind, fits = () => true) => new Promise((done) => {
  model.addEventListener(kind, function heard({ detail }) {
    if (!fits(detail)) return;
    model.removeEventListener(kind, heard);
    done(detail);
  });
});
const whole = (model) => until(model, "cut", (cut) => cut.last);
const headerOf = (raw) => readHeader(raw.subarray(0, HEAD), raw.subarray(HEAD, HEAD + headerBytes(raw.subarray(0, HEAD))));
const { raw, cuts: expected } = MODELS.find(({ name }) => name === "deltas");
const header = await headerOf(raw);
const bent = (at, by = 1) => {
  const copy = Buffer.from(raw);
  copy[at] ^= by;
  return copy;
};
const second = header.start + header.chunks[0].bytes;

for (const { name, raw, cuts } of MODELS) {
  test(`cuts of ${name} are those of Python, to the rounding of float32`, async () => {
    const { model } = await from(raw, { budget: cuts[0].ratio });
    for (const { ratio, count, ...attributes } of cuts) {
      model.setBudget(ratio);
      const cut = model.cut?.ratio === ratio && model.cut.last ? model.cut
        : await until(model, "cut", (cut) => cut.last && cut.ratio === ratio);
      assert.equal(cut.count, count);
      for (const [attribute, values] of Object.entries(attributes)) {
        assert.equal(cut[attribute].length, values.length, attribute);
        values.forEach((value, i) => {
          const error = Math.abs(cut[attribute][i] - value);
          assert.ok(error <= 5e-7 * Math.max(1, Math.abs(value)), `${attribute}[${i}] at ${ratio}: off by ${error}`);
        });
      }
    }
    assert.equal(cuts.length, 12);
  });
}

test("stages come one after another, each when its bytes are there", async () => {
  const { chunks, start } = header;
  let rest;
  const { model, cuts, server } = await from(raw, {}, (request, response, bytes) =>
    range(request, response, bytes, 0, (part) => { // the first stage, and the others later
      response.write(part.subarray(0, start + chunks[0].bytes));
      rest = () => response.end(part.subarray(start + chunks[0].bytes));
    }));
  const first = await until(model, "cut");
  assert.equal(first.ratio, chunks[0].ratio);
  assert.equal(first.last, false);
  rest();
  await whole(model);
  assert.deepEqual(cuts.map((cut) => cut.ratio), chunks.map((chunk) => chunk.ratio));
  assert.deepEqual(server.asked, ["bytes=0-65535"]);
});

test("a budget reads no more of a large file than it needs, and a larger one goes on from there", async () => {
  const { model, server } = await from(raw, { budget: "1%" }, (request, response, bytes) =>
    range({ headers: { range: request.headers.range.replace(/-65535$/, `-${header.start + 40}`) } }, response, bytes));
  await whole(model);
  model.setBudget(1);
  await whole(model);
  const first = header.start + header.chunks[0].bytes;
  assert.deepEqual(server.asked, ["bytes=0-65535", `bytes=${header.start + 41}-${first - 1}`,
    `bytes=${first}-${header.size - header.last.bytes - 1}`]);
  const cameras = await model.cameras();
  assert.ok(cameras.every((camera) => camera.viewmat.length === 16 && camera.fx > 0));
});

test("budgets", () => {
  const kept = (budget) => resolve(budget, { ...header, count: 1000 }).count;
  assert.deepEqual(["5%", 0.05, "0.05", "1", 200, "1k", "2M", "quest", "0.3 k"].map(kept),
    [50, 50, 50, 1000, 200, 1000, 1000, 1000, 300]);
  const [one, two] = [1, 2].map((n) => header.chunks.slice(0, n).reduce((end, chunk) => end + chunk.bytes, header.start));
  assert.equal(resolve(`${two / 1e3}kB`, header).ratio, header.chunks[1].ratio);
  assert.equal(resolve(`${(two - 1) / 1e6} MB`, header).ratio, header.chunks[0].ratio);
  for (const wrong of [`${(one - 1) / 1e3}kB`, "0", "0%", "101%", "5 %%", "1.5", "lots", "", "0.5 k g", -3, "NaN"]) {
    assert.throws(() => resolve(wrong, header), /^Error: budget/, String(wrong));
  }
  assert.throws(() => new Model("data:,", { budget: "0ms" }), /budget 0ms/);
});

test("frame times move the cut: down where frames are slow, up where they are not, and it settles", () => {
  for (const [limits, perRatio, wanted] of [[[1000 / 60], 50, 0.33], [[1000 / 60, 1000 / 30], 400, 0.083],
    [[20], 10, 1], [[1000 / 60, 1000 / 30], 10, 1]]) {
    const pace = new Pace(limits), ratios = [];
    let ratio = 0.5;
    for (let i = 0; i < 4000; i++) ratios.push(ratio = pace.next(Math.max(16.6, perRatio * ratio), ratio));
    const late = ratios.slice(3000);
    assert.ok(Math.min(...late) > 0.6 * wanted && Math.max(...late) <= Math.min(1, 1.55 * wanted), `${late.slice(-5)}`);
    assert.ok(late.filter((r, i) => i && r !== late[i - 1]).length < 10, "the picture pulses");
  }
});

test("a budget of frames follows the frames that are drawn", async () => {
  const { model } = await from(raw, { budget: "auto" });
  assert.equal((await whole(model)).ratio, 1);
  const less = until(model, "cut");
  for (let i = 0; i < 8; i++) model.frame(100);
  const { ratio } = await less;
  assert.ok(ratio < 0.5 && ratio > 0.1);
  model.setBudget("100%");
  assert.equal((await whole(model)).ratio, 1);
});

test("loading stops and goes on where it was", async () => {
  const { chunks, start } = header;
  const { model, cuts, server } = await from(raw, {}, (request, response, bytes, count) =>
    range(request, response, bytes, 0, (part) => count > 1 ? response.end(part)
      : response.write(part.subarray(0, start + chunks[0].bytes + 30))));
  await until(model, "progress", ({ loaded }) => loaded === start + chunks[0].bytes + 30);
  model.pause();
  model.resume();
  assert.equal((await whole(model)).ratio, 1);
  assert.equal(server.asked.at(-1).split("-")[0], `bytes=${start + chunks[0].bytes + 30}`);
  assert.equal(cuts.length, chunks.length);
});

/** Answer the first request up to `length` bytes, and then do something else; all others as a server does. */
const halting = (length, then = () => {}) => (request, response, bytes, count) =>
  range(request, response, bytes, count, (part) => {
    if (count > 1) return response.end(part);
    response.write(part.subarray(0, length));
    then(response);
  });

test("what has arrived is cut at once, while more is on its way and while loading is stopped", async () => {
  const { chunks } = header, { model } = await from(raw, {}, halting(second + 10));
  await until(model, "cut");
  for (const stop of [() => {}, () => model.pause()]) {
    stop();
    const half = until(model, "cut");
    model.setBudget(chunks[0].ratio / 2);
    assert.equal((await half).last, true);
    const again = until(model, "cut");
    model.setBudget(1);
    assert.deepEqual([(await again).ratio, model.cut.last], [chunks[0].ratio, false]);
  }
  model.resume();
  assert.equal((await whole(model)).ratio, 1);
});

test("a header that is interrupted is read on", async () => {
  for (const stop of [(model) => model.pause(), () => {}]) {
    const { model } = await from(raw, {}, halting(HEAD + 5, (response) => stop.length || setTimeout(() => response.destroy(), 20)));
    await until(model, "progress", ({ loaded }) => loaded === HEAD + 5);
    stop(model);
    model.resume();
    assert.equal((await whole(model)).ratio, 1);
  }
});

test("after a failure resume() tries again, and so does a budget that needs more", async () => {
  const resumed = (model) => model.resume(), moved = (model) => model.setBudget(0.9);
  for (const [bytes, again] of [[bent(0), resumed], [bent(HEAD + 3), resumed], [bent(second + 20), resumed],
    [bent(second + 20), moved]]) {
    const { model } = await from(raw, {}, (request, response, right, count) =>
      range(request, response, count > 1 ? right : bytes));
    await until(model, "failed");
    again(model);
    assert.equal((await whole(model)).ratio, model.budget);
  }
  const { model } = await from(raw, { budget: `${(second - 1) / 1e3}kB` }); // less than the first stage
  for (let i = 0; i < 2; i++) {
    const failed = until(model, "failed");
    model.resume();
    assert.match((await failed).message, /found less than the [\d.]+ MB of the first stage/);
  }
  model.setBudget(1);
  assert.equal((await whole(model)).ratio, 1);
});

test("a model that is closed says no more, and keeps nobody waiting", async () => {
  let gone;
  const closed = new Promise((done) => { gone = done; });
  const { model, cuts } = await from(raw, {}, halting(second + 10, (response) => response.on("close", gone)));
  await until(model, "cut");
  assert.equal(model.cameras(), model.cameras());
  const waiting = model.cameras();
  model.close();
  await assert.rejects(waiting, { name: "AbortError" });
  await assert.rejects(model.cameras(), { name: "AbortError" });
  await closed; // the request has been ended
  assert.equal(cuts.length, 1);
  const server = await served(raw);
  opened.push(server.close);
  await assert.rejects(open(server.url, { signal: AbortSignal.abort() }), { name: "AbortError" });
});

test("a lost connection is taken up again, and a server without ranges will do", async () => {
  for (const status of [206, 200]) {
    const { model } = await from(raw, {}, (request, response, bytes, count) => {
      const send = (part) => {
        if (count > 1) return response.end(part);
        response.write(part.subarray(0, 300));
        setTimeout(() => response.destroy(), 20);
      };
      if (status === 206) return range(request, response, bytes, count, send);
      response.writeHead(200, { "Content-Length": bytes.length });
      send(bytes);
    });
    assert.equal((await whole(model)).count, header.count);
  }
});

for (const [what, bytes, message, shown] of [
  ["another file", Buffer.from("<!doctype html><title>no</title>"), /not a packed model; expected a file of `flexgs pack`/],
  ["an empty file", Buffer.alloc(0), /ends after 0 bytes|says 416/],
  ["version 1", bent(6, 3), /--exact \(version 1\)/],
  ["a newer version", bent(6, 9), /format 11, expected 2/],
  ["a damaged header", bent(HEAD + 3), /header is damaged/],
  ["a truncated file", raw.subarray(0, raw.length - 9), /found \d+ bytes, expected \d+ as its header says/],
  ["a damaged second stage", bent(second + 20), /model.fgs: the stage of 5 % is damaged, or the file has changed/, 0.01],
]) {
  test(`${what} is refused in a line, and what was shown stays`, async () => {
    const { model } = await from(bytes);
    const error = await until(model, "failed");
    assert.match(error.message, message);
    assert.ok(!error.message.includes("\n"));
    assert.equal(model.cut?.ratio, shown);
  });
}

test("a file that changes while it is read is refused", async () => {
  const { model } = await from(raw, { budget: "1%" }, (request, response, bytes, count) => {
    const short = { headers: { range: request.headers.range.replace(/-65535$/, `-${second - 1}`) } };
    const { writeHead } = response;
    response.writeHead = (status, headers) => writeHead.call(response, status, { ...headers, ETag: `"${count}"` });
    range(short, response, bytes);
  });
  await whole(model);
  model.setBudget(1);
  assert.match((await until(model, "failed")).message, /has changed while it was read; load the page again/);
});

test("a server that refuses is named, and asked again only if that may help", async () => {
  for (const [status, times, message] of [[404, 1, /says 404/], [503, 4, /says 503/]]) {
    const { model, server } = await from(raw, {}, (_, response) => response.writeHead(status).end());
    assert.match((await until(model, "failed")).message, message);
    assert.equal(server.asked.length, times);
  }
});

test("damaged chunks end in an error, soon, and never in something else", () => {
  const body = raw.subarray(header.start, second), most = 1e6;
  const right = decompress(body, most);
  assert.throws(() => decompress(body, right.length - 1), /too long/);
  for (let length = 0; length < body.length; length += 7) {
    assert.throws(() => decompress(body.subarray(0, length), most), Error);
  }
  for (let at = 0; at < body.length; at += 3) {
    const copy = Uint8Array.from(body);
    copy[at] ^= 0x55;
    try {
      assert.ok(decompress(copy, most).length <= most);
    } catch (e) {
      assert.match(e.message, /LZMA data/);
    }
  }
});

test("a cut is a PLY file that others read", async () => {
  const { model } = await from(raw, { budget: 0.5 });
  const cut = await whole(model), ply = plyOf(cut), text = new TextDecoder("latin1").decode(ply);
  const head = text.slice(0, text.indexOf("end_header\n") + 11), names = [...head.matchAll(/property float (\w+)/g)];
  assert.match(head, new RegExp(`element vertex ${cut.count}\n`));
  assert.equal(ply.length, head.length + 4 * names.length * cut.count);
  const row = new Float32Array(ply.slice(head.length).buffer, 4 * names.length, names.length);
  const value = (name) => row[names.findIndex((found) => found[1] === name)];
  assert.equal(value("y"), cut.means[4]);
  assert.equal(value("rot_3"), cut.quats[7]);
  const K = cut.shN.length / (3 * cut.count);
  assert.equal(value(`f_rest_${K + 1}`), cut.shN[3 * K + 3 + 1]); // green of the second harmonic of the second
});

test("open() resolves to a model whose header is known, or rejects", async () => {
  const server = await served(raw);
  opened.push(server.close);
  const model = await open(server.url, { budget: "1%" });
  assert.equal(model.header.count, expected.at(-1).count);
  assert.throws(() => model.setBudget("much"), /expected something like 5%/);
  model.close();
  const { close, url } = await served(raw, (_, response) => response.writeHead(404).end());
  opened.push(close);
  await assert.rejects(open(url), /says 404/);
});
