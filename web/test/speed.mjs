// How long a re-cut of a million Gaussians takes here, on one core: node test/speed.mjs [FILE.fgs]
// (of a million, unless a file is named). Median and longest of 40, at ratios from 1 to 99 %.
import { readFileSync } from "node:fs";
import { source } from "./source.mjs";

const { Model } = await source("model");
const { countAt, headerBytes, readHeader, HEAD } = await source("header");
const header = { count: 1_000_000, shDegree: 3, unit: 1, knots: [0.01, 0.032, 0.1, 0.32, 0.5], chunks: [] };
header.knotRows = header.knots.map((knot) => countAt(knot, header.count));
let model = new Model(header);
if (process.argv[2]) {
  const raw = readFileSync(process.argv[2]), head = raw.subarray(0, HEAD);
  const found = await readHeader(head, raw.subarray(HEAD, HEAD + headerBytes(head)));
  model = new Model(found);
  let at = found.start;
  const begun = process.cpuUsage().user;
  for (const { bytes } of found.chunks) model.fill(raw.subarray(at, (at += bytes)));
  console.log(`decoded in ${((process.cpuUsage().user - begun) / 1e6).toFixed(2)} s`);
}
const times = Array.from({ length: 40 }, (_, i) => {
  const ratio = (1 + ((i * 37) % 99)) / 100, begun = process.cpuUsage();
  model.cut(countAt(ratio, model.header.count), ratio);
  const { user, system } = process.cpuUsage(begun);
  return (user + system) / 1000;
}).sort((a, b) => a - b);
console.log(`${model.header.count} Gaussians: a re-cut takes ${times[20].toFixed(1)} ms, at most ${times[39].toFixed(1)} ms`);
