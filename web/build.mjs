// Builds dist/: the package's two modules with their types; and flexgs/view/web/flexgs.js, which `flexgs cut --web`
// hands out, so that Python users need no Node.js. The worker's program is a string in each of them.
import { build } from "esbuild";
import { execFileSync } from "node:child_process";
import { fileURLToPath } from "node:url";

process.chdir(fileURLToPath(new URL(".", import.meta.url)));
const shared = { bundle: true, minify: true, format: "esm", target: "es2022", legalComments: "none", logLevel: "warning" };
const worker = await build({ ...shared, format: "iife", entryPoints: ["src/worker.ts"], write: false });
const modules = { ...shared, define: { WORKER: JSON.stringify(worker.outputFiles[0].text.trim()) } };
await build({ ...modules, entryPoints: { flexgs: "src/index.ts", view: "src/view.ts" }, outdir: "dist" });
await build({ ...modules, entryPoints: ["src/view.ts"], outfile: process.argv[2] ?? "../flexgs/view/web/flexgs.js" });
execFileSync(process.execPath, ["node_modules/typescript/bin/tsc"], { stdio: "inherit" });
