// Tests the page in Debian's chromium on SwiftShader's WebGPU: node test.mjs PACKAGES FOLDER [--picture] [NAME], where
// PACKAGES holds node_modules/playwright-core, and FOLDER the packages `page` and `suite`. With --picture, writes
// docs/web.png.

import assert from 'node:assert/strict';
import { closeSync, mkdtempSync, openSync, rmSync, statSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { serve } from './serve.mjs';

const [packages, folder, ...rest] = process.argv.slice(2);
const picture = rest.includes('--picture');
// Runs the tests alone whose names have this in them.
const filter = rest.find((argument) => argument !== '--picture') ?? '';
const { chromium } = (await import(pathToFileURL(resolve(packages, 'node_modules/playwright-core/index.js')))).default;

const server = await serve(folder, 0);
const origin = `http://localhost:${server.address().port}`;
const work = mkdtempSync(join(tmpdir(), 'gradclip-web-'));
const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    args: ['--no-sandbox', '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--disable-dev-shm-usage'],
});

// Every page of a test: nothing leaves the origin, and nothing is thrown that the page does not show.
const open = async ({ prepare, ...options } = {}) => {
    const context = await browser.newContext({ viewport: { width: 1000, height: 900 }, ...options });
    const page = await context.newPage();
    page.setDefaultTimeout(240_000);
    page.foreign = [];
    page.errors = [];
    page.on('request', (request) => {
        if (!/^(data|blob):/.test(request.url()) && !request.url().startsWith(`${origin}/`)) page.foreign.push(request.url());
    });
    page.on('pageerror', (error) => page.errors.push(String(error)));
    if (prepare) await page.addInitScript(prepare);
    return page;
};
const close = async (page) => {
    assert.deepEqual(page.foreign, [], 'the page asks nobody');
    assert.deepEqual(page.errors, [], 'nothing is thrown that the page does not show');
    await page.context().close();
};
const goto = async (page) => {
    await page.goto(`${origin}/page/`);
    await state(page, 'Ready');
};
const state = (page, text) => page.locator('#device-state').filter({ hasText: text }).waitFor();
const text = (page, selector) => page.locator(selector).innerText();
const mark = async (page, section) => {
    await page.locator(`#${section}-result .mark, #${section}-result .bad`).first().waitFor();
    return text(page, `#${section}-result`);
};
const fileOf = async (page, path) => {
    await page.locator('#file-result').evaluate((into) => into.replaceChildren());
    await page.setInputFiles('#file', path);
    return mark(page, 'file');
};

// A safetensors file of these tensors: [name, dtype, shape, bytes].
const header = (tensors) => {
    let at = 0;
    const entries = tensors.map(([name, dtype, shape, bytes]) => [name, { dtype, shape, data_offsets: [at, (at += bytes)] }]);
    const json = Buffer.from(JSON.stringify(Object.fromEntries(entries)));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(json.length));
    return Buffer.concat([length, json]);
};
const written = (name, ...parts) => {
    const path = join(work, name);
    writeFileSync(path, Buffer.concat(parts));
    return path;
};

const tests = {
    async 'the text is there before the wasm'() {
        const page = await open();
        let go;
        const held = new Promise((done) => { go = done; });
        await page.route('**/*.wasm', async (route) => {
            await held;
            await route.continue();
        });
        await page.goto(`${origin}/page/`, { waitUntil: 'commit' });
        assert.match(await text(page, 'h1'), /gradclip/);
        const paints = () => page.evaluate(() => performance.getEntriesByName('first-contentful-paint').length);
        while ((await paints()) === 0) await page.waitForTimeout(20);
        assert.equal(await text(page, '#device-state'), 'Loading…');
        assert.ok(await page.locator('#verify').isDisabled());
        go();
        await state(page, 'Ready');
        await close(page);
    },

    async 'device, verify, measure, why and the report'() {
        const page = await open();
        await goto(page);
        assert.match(await text(page, '#device'), /largest buffer/);
        await page.selectOption('#cases', '10');
        await page.click('#verify');
        const verified = await mark(page, 'verify');
        assert.match(verified, /✓ GPU and CPU agree in all 10 cases/);
        assert.match(verified, /worst error of a norm\s+\d\.\de-\d+/);
        const why = await text(page, '#why');
        assert.match(why, /1e20\s+1e21\s+inf\s+1(\.0+\d*)?e21\s+0\s+0\.1/);
        assert.match(why, /1e-25\s+1e-24\s+0\s/);
        assert.match(why, /a million gradients of 0\.1\s+100\s/);
        if (picture) {
            await fileOf(page, 'examples/data/nan_grads.safetensors');
            await page.evaluate(() => document.activeElement.blur());
            await page.setViewportSize({ width: 800, height: 900 });
            await page.screenshot({ path: 'docs/web.png', fullPage: true });
            console.log(`  docs/web.png: ${statSync('docs/web.png').size} bytes`);
        }
        await page.click('#measure');
        await page.locator('#measure-result tbody tr').first().waitFor({ timeout: 600_000 });
        const rows = await page.locator('#measure-result tbody tr').allInnerTexts();
        for (const dtype of ['float32', 'float16', 'bfloat16']) {
            for (const name of ['norm', 'unclipped', 'clipped', 'value']) {
                const of = rows.filter((row) => row.startsWith(`${dtype},`) && row.includes(`\t${name}\t`));
                assert.ok(of.length >= 2, `${dtype} ${name}: ${rows.join('\n')}`);
                assert.ok(of.every((row) => Number(row.split('\t')[3]) > 0), of.join('\n'));
            }
        }
        assert.ok((await page.locator('#measure-result svg polyline').count()) >= 12);
        await page.click('#copy');
        const report = JSON.parse(await page.inputValue('#json'));
        assert.equal(report.verified.agrees, true);
        assert.equal(report.measured.rows.length, rows.length);
        assert.ok(report.measured.copy_gb_s > 0 && report.device.limits.max_buffer_size > 0);
        console.log(`  copy ${report.measured.copy_gb_s.toFixed(1)} GB/s, ${report.measured.by_host_clock} of ${rows.length} times by the host's clock, timestamps in steps of ${report.device.probed.timestamp_step} s`);
        await close(page);
    },

    async 'a small file: the table and the plot of gradclip norm'() {
        const page = await open();
        await goto(page);
        const shown = await fileOf(page, 'examples/data/nan_grads.safetensors');
        assert.match(shown, /✗ 1 non-finite element, the first at index 4,321 of tensor "rnn\.weight_ih_l1"/);
        assert.match(shown, /45,004 in 11 tensors/);
        assert.match(shown, /rnn\.weight_hh_l0 \[192, 48\] float32\s+154\.476/);
        assert.match(await page.locator('#file-result svg').textContent(), /1 non-finite/);
        assert.match(await fileOf(page, 'examples/data/lstm_grads.safetensors'), /✓ Every element is finite/);
        // The file is no part of what is copied.
        await page.click('#copy');
        assert.ok(!(await page.inputValue('#json')).includes('rnn.'));
        await close(page);
    },

    async 'a file of 1 GiB is streamed'() {
        const [elements, bad] = [2 ** 28 - 2 ** 20, 2 ** 27 + 12_345];
        const path = join(work, 'large.safetensors');
        const file = openSync(path, 'w');
        writeSync(file, header([['large', 'F32', [elements], 4 * elements], ['small', 'BF16', [3], 6]]));
        const block = new Float32Array(2 ** 20).fill(0.5);
        for (let at = 0; at < elements; at += block.length) {
            const place = bad - at;
            if (place >= 0 && place < block.length) block[place] = NaN;
            writeSync(file, new Uint8Array(block.buffer));
            block.fill(0.5);
        }
        writeSync(file, Buffer.from([0x80, 0x3f, 0, 0x40, 0, 0x40]));
        closeSync(file);
        const page = await open();
        await goto(page);
        const session = await page.context().newCDPSession(page);
        await session.send('Performance.enable');
        const begin = performance.now();
        const shown = await fileOf(page, path);
        const seconds = (performance.now() - begin) / 1e3;
        assert.match(shown, /✗ 1 non-finite element, the first at index 134,230,073 of tensor "large"/);
        assert.match(shown, /small \[3\] bfloat16\s+3\s/);
        const { metrics } = await session.send('Performance.getMetrics');
        const heap = metrics.find(({ name }) => name === 'JSHeapTotalSize').value;
        assert.ok(heap < 2 ** 28, `a heap of ${heap} bytes`);
        console.log(`  1 GiB in ${seconds.toFixed(1)} s, ${/time\s+(.*)/.exec(shown)?.[1]}`);
        rmSync(path);
        await close(page);
    },

    async 'a file that is dropped'() {
        const page = await open();
        await goto(page);
        const bytes = [...Buffer.concat([header([['w', 'F32', [2], 8]]), Buffer.from(new Float32Array([3, 4]).buffer)])];
        await page.evaluate((bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], 'dropped.safetensors'));
            document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));
        }, bytes);
        assert.match(await mark(page, 'file'), /total norm\s+5 \(L2\)/);
        await close(page);
    },

    async 'hostile and truncated files are told, and the page goes on'() {
        const page = await open();
        await goto(page);
        const huge = Buffer.alloc(16, 0xff);
        const good = Buffer.concat([header([['w', 'F32', [2], 8]]), Buffer.alloc(8)]);
        const cases = [
            ['empty', Buffer.alloc(0), /too few for a header/],
            ['huge', huge, /the header claims/],
            ['truncated', good.subarray(0, good.length - 3), /is it truncated\?/],
            ['text', Buffer.from('this is no safetensors file, but long enough'), /the header claims/],
            ['json', Buffer.concat([Buffer.from([4, 0, 0, 0, 0, 0, 0, 0]), Buffer.from('{"a"')]), /not valid JSON/],
            ['gap', Buffer.concat([good, Buffer.alloc(5)]), /belong to no tensor/],
            ['complex', Buffer.concat([header([['z', 'C64', [1], 8]]), Buffer.alloc(8)]), /is complex/],
        ];
        for (const [name, bytes, why] of cases) assert.match(await fileOf(page, written(name, bytes)), why, name);
        const name = '<img src=x onerror="document.title=1">';
        const shown = await fileOf(page, written(`${'<b>'}.safetensors`, header([[name, 'F32', [2], 8]]), Buffer.alloc(8)));
        assert.ok(shown.includes('<img'), shown);
        assert.equal(await page.locator('#file-result img, #file-result b').count(), 0);
        assert.match(await fileOf(page, 'examples/data/nan_grads.safetensors'), /4,321/);
        await close(page);
    },

    async 'a device that is lost can be opened again'() {
        const page = await open({
            prepare: () => {
                const request = GPUAdapter.prototype.requestDevice;
                globalThis.devices = [];
                GPUAdapter.prototype.requestDevice = async function (...given) {
                    const device = await request.apply(this, given);
                    globalThis.devices.push(device);
                    return device;
                };
            },
        });
        await goto(page);
        await page.evaluate(() => globalThis.devices.forEach((device) => device.destroy()));
        await page.click('#verify');
        assert.match(await mark(page, 'verify'), /lost/);
        assert.match(await text(page, '#device-state'), /took the device away/);
        assert.match(await fileOf(page, 'examples/data/nan_grads.safetensors'), /4,321/);
        await page.click('#reopen');
        await state(page, 'Ready');
        await page.selectOption('#cases', '10');
        await page.click('#verify');
        assert.match(await mark(page, 'verify'), /✓ GPU and CPU agree/);
        await close(page);
    },

    async 'a device too small for the largest size'() {
        const page = await open({
            prepare: () => {
                const create = GPUDevice.prototype.createBuffer;
                // Refused as a buffer is that the device has no memory for.
                GPUDevice.prototype.createBuffer = function (descriptor) {
                    const refused = descriptor.size > 2 ** 20 && !descriptor.mappedAtCreation;
                    const size = refused ? 2 ** 50 : descriptor.size;
                    return create.call(this, { ...descriptor, size });
                };
            },
        });
        await goto(page);
        await page.click('#measure');
        await page.locator('#measure-result tbody tr').first().waitFor();
        const shown = await text(page, '#measure-result');
        assert.match(shown, /1Mi elements of copy were left out: the GPU is out of memory/);
        assert.equal(await page.locator('#measure-result tbody tr').count(), 12);
        await close(page);
    },

    async 'what is timed waits while the tab is in the background'() {
        const page = await open({
            prepare: () => {
                globalThis.hide = (hidden) => {
                    Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
                    document.dispatchEvent(new Event('visibilitychange'));
                };
            },
        });
        await goto(page);
        await page.evaluate(() => globalThis.hide(true));
        await page.click('#measure');
        await page.locator('#measure-progress').filter({ hasText: 'in the background' }).waitFor();
        await page.waitForTimeout(500);
        assert.equal(await page.locator('#measure-result tbody tr').count(), 0);
        await page.evaluate(() => globalThis.hide(false));
        await page.locator('#measure-result tbody tr').first().waitFor();
        await close(page);
    },

    async 'without WebGPU the file part works, and the page says what is missing'() {
        const page = await open({
            prepare: () => Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined, configurable: true }),
        });
        await page.goto(`${origin}/page/`);
        await state(page, 'No GPU: this browser has no WebGPU');
        assert.match(await fileOf(page, 'examples/data/nan_grads.safetensors'), /4,321/);
        assert.match(await text(page, '#why'), /a million/);
        assert.ok(await page.locator('#verify').isDisabled());
        await close(page);
    },

    async 'a browser that gives no adapter'() {
        const page = await open({
            prepare: () => { GPU.prototype.requestAdapter = async () => null; },
        });
        await page.goto(`${origin}/page/`);
        await state(page, 'No GPU: the browser gives this page no adapter');
        assert.match(await fileOf(page, 'examples/data/nan_grads.safetensors'), /4,321/);
        await close(page);
    },

    async 'a phone, dark and light, by keyboard and by name'() {
        const background = {};
        for (const colorScheme of ['light', 'dark']) {
            const page = await open({ colorScheme, viewport: { width: 360, height: 700 } });
            await goto(page);
            await fileOf(page, 'examples/data/nan_grads.safetensors');
            const width = await page.evaluate(() => document.documentElement.scrollWidth);
            assert.ok(width <= 360, `${width} pixels wide`);
            background[colorScheme] = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
            for (const [role, name] of [['button', 'Verify this GPU'], ['button', 'Measure this GPU'], ['button', 'Copy as JSON'],
                ['combobox', 'Cases'], ['heading', 'Your file'], ['img', /Norm of each tensor/], ['region', 'Measure']]) {
                assert.equal(await page.getByRole(role, { name, exact: true }).count(), 1, `${role} ${name}`);
            }
            assert.equal(await page.getByLabel(/Drop a file here/).count(), 1);
            // By Tab in the order of the page, and Enter.
            const reached = [];
            for (let i = 0; i < 20 && !reached.includes('copy'); i++) {
                await page.keyboard.press('Tab');
                reached.push(await page.evaluate(() => document.activeElement.id || document.activeElement.tagName));
            }
            const order = ['cases', 'verify', 'measure', 'file', 'copy'];
            assert.deepEqual(reached.filter((id) => order.includes(id)), order, reached.join(' '));
            await page.keyboard.press('Enter');
            assert.equal(JSON.parse(await page.inputValue('#json')).page, 1);
            await close(page);
        }
        assert.notEqual(background.light, background.dark);
    },

    async 'a part of the library’s suite for the web'() {
        const page = await open();
        await page.goto(`${origin}/page/`);
        const failed = await page.evaluate(async () => {
            const suite = await import('/suite/gradclip_web.js');
            await suite.default();
            const [ran, failed] = [[], []];
            for (const name of suite.suite_names()) {
                // All of it runs on Dawn under node.
                if (!/^(device|plan)::|words_that|every_kernel/.test(name)) continue;
                ran.push(name);
                try {
                    await suite.suite_run(name);
                } catch (error) {
                    failed.push(`${name}: ${error}`);
                }
            }
            return ran.length > 14 ? failed : [`only ${ran} ran`];
        });
        assert.deepEqual(failed, []);
        await close(page);
    },
};

const failed = [];
let ran = 0;
for (const [name, test] of Object.entries(tests)) {
    if (!name.includes(filter)) continue;
    const begin = performance.now();
    let outcome = 'ok';
    try {
        await test();
    } catch (error) {
        outcome = `FAILED: ${error?.stack ?? error}`;
        failed.push(name);
        await Promise.all(browser.contexts().map((context) => context.close().catch(() => {})));
    }
    ran += 1;
    console.log(`test ${name} ... ${outcome} (${((performance.now() - begin) / 1e3).toFixed(1)} s)`);
}
await browser.close();
server.close();
rmSync(work, { recursive: true });
if (failed.length > 0 || ran === 0) {
    console.error(`error: ${failed.length} of ${ran} tests failed: ${failed.join('; ')}`);
    process.exit(1);
}
console.log(`web page: ${ran} tests passed`);
process.exit(0);
