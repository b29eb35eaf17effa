// A module of src/, compiled for Node.js: tests reach inside, and need nothing to be built before.
import { build } from "esbuild";
import { fileURLToPath } from "node:url";

export async function source(name) {
  const { outputFiles } = await build({ entryPoints: [fileURLToPath(new URL(`../src/${name}.ts`, import.meta.url))],
    bundle: true, format: "esm", target: "es2022", write: false });
  return import(`data:text/javascript;base64,${Buffer.from(outputFiles[0].text).toString("base64")}`);
}
