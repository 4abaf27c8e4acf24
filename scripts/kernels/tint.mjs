// Whether Tint, Chrome's compiler, takes every WGSL module of a folder: node check.mjs PACKAGES FOLDER, where PACKAGES holds
// node_modules/webgpu. Modules with native arrays of bindings, which no browser has, are counted and not checked.

import { readdirSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const [packages, folder] = process.argv.slice(2);
const { create, globals } = await import(pathToFileURL(resolve(packages, 'node_modules/webgpu/index.js')));
Object.assign(globalThis, globals);

const gpu = create([]);
const adapter = await gpu.requestAdapter();
if (!adapter?.features.has('subgroups')) {
    console.error(`error: WebGPU finds no device with subgroups: ${adapter?.info.description ?? 'none at all'}`);
    process.exit(1);
}
const device = await adapter.requestDevice({ requiredFeatures: ['subgroups'] });

// Browsers want subgroups enabled, and naga does not know how yet.
const standard = (source) => (source.includes('@builtin(subgroup') ? `enable subgroups;\n${source}` : source);

let valid = 0;
let native = 0;
let refused = 0;
// By message, the first module that it is about.
const messages = new Map();
for (const file of readdirSync(folder).filter((file) => file.endsWith('.wgsl')).sort()) {
    const source = readFileSync(join(folder, file), 'utf8');
    if (source.includes('enable wgpu_binding_array;')) {
        native += 1;
        continue;
    }
    const code = standard(source);
    device.pushErrorScope('validation');
    const info = await device.createShaderModule({ code }).getCompilationInfo();
    const error = await device.popErrorScope();
    const first = info.messages.find((message) => message.type === 'error');
    const message = first?.message ?? error?.message;
    if (message === undefined) {
        valid += 1;
        continue;
    }
    refused += 1;
    const place = first ? `:${first.lineNum}: ${code.split('\n')[first.lineNum - 1]?.trim()}` : '';
    messages.set(message, messages.get(message) ?? `${file}${place}`);
}
for (const [message, place] of messages) console.error(`error: ${message}\n    ${place}`);
const all = valid + refused;
console.log(`tint: ${valid} of ${all} variants valid (${native} for native binding arrays not checked)`);
process.exit(valid === all && all > 0 ? 0 : 1);
