// Builds dist/: the package's two modules with their types; and flexgs/deploy/web/flexgs.js, which `flexgs cut --web`
// hands out, so that Python users need no Node.js. The programs of the
// workers are strings in each of them. The package gets the project's licence.
import { build } from "esbuild";
import { execFileSync } from "node:child_process";
import { copyFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

process.chdir(fileURLToPath(new URL(".", import.meta.url)));
const shared = { bundle: true, minify: true, charset: "ascii", format: "esm", target: "es2022", legalComments: "none",
  logLevel: "warning" };
const program = async (file) => {
  const { outputFiles } = await build({ ...shared, format: "iife", entryPoints: [file], write: false });
  return JSON.stringify(outputFiles[0].text.trim());
};
const modules = { ...shared, define: { WORKER: await program("src/worker.ts"), SORTER: await program("src/sorter.ts") } };
await build({ ...modules, entryPoints: { flexgs: "src/index.ts", view: "src/view.ts" }, outdir: "dist" });
await build({ ...modules, format: "iife", entryPoints: ["src/view.ts"],
  outfile: process.argv[2] ?? "../flexgs/deploy/web/flexgs.js" });
execFileSync(process.execPath, ["node_modules/typescript/bin/tsc"], { stdio: "inherit" });
copyFileSync("../LICENSE", "LICENSE");
