// Runs the library's tests for the web on Dawn, Chrome's WebGPU, under node: node suite.mjs PACKAGES FOLDER, where PACKAGES
// holds node_modules/webgpu, and FOLDER the package with the feature `suite`.

import { readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const [packages, folder] = process.argv.slice(2);
const { create, globals } = await import(pathToFileURL(resolve(packages, 'node_modules/webgpu/index.js')));
Object.assign(globalThis, globals);

// What wgpu looks for in a page.
const gpu = create([]);
Object.defineProperty(globalThis, 'navigator', { value: { gpu }, configurable: true });
globalThis.Window = class {};
globalThis.window = globalThis;
Object.setPrototypeOf(globalThis, globalThis.Window.prototype);

const adapter = await gpu.requestAdapter();
if (!adapter) {
    console.error('error: WebGPU finds no adapter');
    process.exit(1);
}
console.log(`on ${adapter.info.description || adapter.info.vendor}`);

const suite = await import(pathToFileURL(resolve(folder, 'gradclip_web.js')));
await suite.default({ module_or_path: readFileSync(join(folder, 'gradclip_web_bg.wasm')) });
const failed = [];
const names = suite.suite_names();
for (const name of names) {
    const begin = performance.now();
    let outcome = 'ok';
    try {
        await suite.suite_run(name);
    } catch (error) {
        outcome = `FAILED: ${error?.stack ?? error}`;
        failed.push(name);
    }
    console.log(`test ${name} ... ${outcome} (${Math.round(performance.now() - begin)} ms)`);
    // A panic leaves the module unusable.
    if (outcome.includes('RuntimeError')) break;
}
if (failed.length > 0 || names.length === 0) {
    console.error(`error: ${failed.length} of ${names.length} tests failed: ${failed.join(', ')}`);
    process.exit(1);
}
console.log(`web suite: ${names.length} tests passed`);
process.exit(0);
