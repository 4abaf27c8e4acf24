// What the page does: it opens the device, and shows what `gradclip_web.js` answers. Names in a file may be anything, so text
// goes into the page as text.

const $ = (id) => document.getElementById(id);
const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
};

// What "Copy as JSON" copies. Nothing of a file is in it.
const report = { page: 1, browser: navigator.userAgent };
let web;
let gpu;
let busy = false;
let wasHidden = document.hidden;
document.addEventListener('visibilitychange', () => { wasHidden ||= document.hidden; });

// Lets the browser draw and answer. A timer would be slowed down in the background.
const breath = () => new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = done;
    port2.postMessage(0);
});
const visible = () => new Promise((done) => {
    if (!document.hidden) return done();
    document.addEventListener('visibilitychange', done, { once: true });
});

// A function that shows how far something is. It answers whether the tab was in the background since the last call.
// What is timed waits there until the tab is back.
const progress = (name, timed) => {
    const box = $(`${name}-progress`);
    const [bar, text] = box.children;
    let drawn = 0;
    box.hidden = false;
    wasHidden = document.hidden;
    return async (done, total, next) => {
        const hidden = wasHidden;
        bar.max = total || 1;
        bar.value = done;
        text.textContent = timed ? next : `${Math.floor((100 * done) / (total || 1))} %`;
        if (timed && document.hidden) {
            text.textContent = 'waits while the tab is in the background: its times would be wrong';
            await visible();
        }
        wasHidden = document.hidden;
        if (performance.now() - drawn > 50) {
            await breath();
            drawn = performance.now();
        }
        return hidden;
    };
};

const fail = (into, error) => {
    into.replaceChildren(element('p', error?.message ?? String(error), 'bad'));
    if (error?.name === 'DeviceLost') lost(error.message);
};

// A panic leaves the module unusable, and who waits for it waits for ever.
window.addEventListener('error', ({ error }) => {
    if (!(error instanceof WebAssembly.RuntimeError)) return;
    web = gpu = undefined;
    $('device-state').textContent = 'The page has failed by a fault of its own. Load it again to go on, and please report what the browser’s console says.';
    for (const box of document.querySelectorAll('.progress')) box.hidden = true;
    enable();
});

const enable = () => {
    for (const id of ['verify', 'measure']) $(id).disabled = busy || !gpu;
    $('file').disabled = busy || !web;
    $('reopen').disabled = busy;
    $('copy').disabled = !report.device;
};

// Runs one thing at a time, and shows what becomes of it.
const run = async (name, timed, work, show) => {
    if (busy) return;
    busy = true;
    enable();
    const into = $(`${name}-result`);
    into.replaceChildren();
    try {
        show(into, JSON.parse(await work(progress(name, timed))));
    } catch (error) {
        fail(into, error);
    } finally {
        $(`${name}-progress`).hidden = true;
        busy = false;
        enable();
    }
};

const pairs = (list, entries) => list.replaceChildren(...entries.flatMap(([term, text]) => [element('dt', term), element('dd', text)]));
const table = (heads, rows, caption) => {
    const box = element('div', undefined, 'scroll');
    const made = box.appendChild(element('table'));
    if (caption) made.append(element('caption', caption, 'note'));
    const head = made.appendChild(element('thead')).appendChild(element('tr'));
    for (const text of heads) head.append(Object.assign(element('th', text), { scope: 'col' }));
    const body = made.appendChild(element('tbody'));
    for (const row of rows) body.appendChild(element('tr')).append(...row.map((text) => element('td', text)));
    return box;
};
// A plot is an SVG document, in which all text is escaped.
const plot = (svg, label) => {
    const figure = element('figure', undefined, 'scroll');
    const made = document.importNode(new DOMParser().parseFromString(svg, 'image/svg+xml').documentElement, true);
    made.setAttribute('role', 'img');
    made.setAttribute('aria-label', label);
    figure.append(made);
    return figure;
};
const three = (number) => Number(number.toPrecision(3)).toString();
const step = (seconds) => (seconds ? `in steps of ${three(seconds * 1e6)} µs` : 'none that moves');
const bytes = (count) => (count >= 2 ** 30 ? `${three(count / 2 ** 30)} GiB` : `${three(count / 2 ** 20)} MiB`);

const open = async () => {
    const state = $('device-state');
    $('reopen').hidden = true;
    if (!navigator.gpu) {
        const where = isSecureContext ? 'this browser has no WebGPU, or it is switched off' : 'WebGPU needs https or localhost';
        state.textContent = `No GPU: ${where}. Verify and measure need it. Your file works all the same, on the CPU.`;
        return;
    }
    state.textContent = 'Opening the device…';
    try {
        gpu = await web.Gpu.open();
        // wgpu does not pass these on.
        const adapter = await navigator.gpu.requestAdapter({ powerPreference: 'high-performance' });
        const { vendor = '', architecture = '', device = '', description = '' } = adapter?.info ?? {};
        const found = JSON.parse(await gpu.describe());
        report.device = { vendor, architecture, device, description, ...found };
        const name = [description, vendor, architecture, device].filter((text) => text).join(', ') || 'without a name';
        pairs($('device'), [
            ['adapter', name + (found.software ? ' (software)' : '')],
            ['largest buffer', `${bytes(found.limits.max_buffer_size)}, of which ${bytes(found.limits.max_storage_buffer_binding_size)} can be bound at once`],
            ['device’s clock', found.features.includes('TIMESTAMP_QUERY') || found.probed.timestamp_step ? step(found.probed.timestamp_step) : 'none: the host’s must do'],
            ['host’s clock', step(found.probed.host_clock_step)],
        ]);
        pairs($('limits-list'), [...Object.entries(found.limits), ['features', found.features.join(', ') || 'none']]);
        $('limits').hidden = false;
        state.textContent = 'Ready. Compiling the kernels…';
        enable();
        const opened = gpu;
        await opened.compile();
        if (gpu === opened) state.textContent = 'Ready.';
    } catch (error) {
        if (error?.name === 'DeviceLost') return lost(error.message);
        gpu = undefined;
        const why = error?.name === 'NoAdapter' ? 'the browser gives this page no adapter' : error?.message ?? error;
        state.textContent = `No GPU: ${why}. Your file works all the same, on the CPU.`;
        $('reopen').hidden = false;
    }
};

const lost = (why) => {
    gpu = undefined;
    $('device-state').textContent = `The browser took the device away: ${why}. Open it again to go on.`;
    $('reopen').hidden = false;
    enable();
};

const showVerified = (into, found) => {
    report.verified = found;
    const mark = found.agrees
        ? element('p', `✓ GPU and CPU agree in all ${found.cases} cases`, 'mark good')
        : element('p', `✗ GPU and CPU differ in ${found.differing.length} of ${found.cases} cases`, 'mark bad');
    const list = element('dl');
    pairs(list, [
        ['elements', found.elements.toLocaleString('en')],
        ['worst error of a norm', found.norm_error],
        ['worst distance', `${found.worst_ulps} ulp (units in the last place)`],
        ['seed', found.seed],
    ]);
    into.append(mark, list);
    for (const how of found.differing.slice(0, 5)) into.append(element('p', how, 'bad'));
};

const showMeasured = (into, { plot: svg, ...found }) => {
    report.measured = found;
    if (found.left_out) into.append(element('p', found.left_out, 'note'));
    if (found.by_host_clock) into.append(element('p', `${found.by_host_clock} of ${found.rows.length} times are by the host’s clock: the device has none, or it does not agree with the host’s.`, 'note'));
    if (!found.rows.length) return;
    into.append(element('p', `A plain copy of the largest size: ${three(found.copy_gb_s)} GB/s.`), plot(svg, 'Throughput of each case against the number of elements; the table below has the numbers'));
    const row = ({ dtype, elements, case: name, seconds, gb_s, of_copy }) =>
        [`${dtype}, ${elements.toLocaleString('en')}`, name, `${three(seconds * 1e3)} ms`, three(gb_s), of_copy.toFixed(2)];
    into.append(table(['elements', 'case', 'time', 'GB/s', 'of copy'], found.rows.map(row)));
};

const showFile = (into, found) => {
    const list = element('dl');
    const lines = [['total norm', found.total_norm], ['non-finite', found.non_finite ?? 'none'], ['elements', found.elements]];
    if (found.left_out) lines.push(['left out', found.left_out]);
    pairs(list, [...lines, ['time', found.time]]);
    into.append(element('p', found.non_finite ? `✗ ${found.non_finite}` : '✓ Every element is finite', `mark ${found.non_finite ? 'bad' : 'good'}`), list);
    const row = ({ name, what, norm, share, non_finite, first, zeros }) => [`${name} ${what}`, norm, share, non_finite, first, zeros];
    into.append(table(['tensor', 'norm', 'share', 'non-finite', 'first at', 'zeros'], found.rows.map(row), found.rows_are));
    into.append(plot(found.plot, 'Norm of each tensor on a logarithmic axis; the table above has the numbers'));
};

const showWhy = (rows) => {
    const row = ({ what, exact, plain, ours, plain_clipped, ours_clipped }) => [what, exact, plain, ours, plain_clipped, ours_clipped];
    const heads = ['gradients', 'exact norm', 'plain float32', 'gradclip', 'plain, clipped to 1', 'gradclip, clipped to 1'];
    $('why').replaceChildren(table(heads, rows.map(row)));
};

const measureFile = (file) => file && run('file', false, (tell) => web.norms(file, tell), showFile);

$('verify').onclick = () => run('verify', false, (tell) => gpu.verify(Math.floor(Math.random() * 2 ** 32), Number($('cases').value), tell), showVerified);
$('measure').onclick = () => run('measure', true, (tell) => gpu.measure(tell), showMeasured);
$('reopen').onclick = () => open();
$('file').onchange = () => measureFile($('file').files[0]);
for (const type of ['dragenter', 'dragover', 'dragleave', 'drop']) {
    // Beside the box too, so that a file that misses it does not replace the page.
    document.addEventListener(type, (event) => {
        event.preventDefault();
        $('drop').classList.toggle('over', type === 'dragenter' || type === 'dragover');
        if (type === 'drop') measureFile(event.dataTransfer.files[0]);
    });
}
$('copy').onclick = async () => {
    const text = JSON.stringify(report, null, 1);
    $('json').value = text;
    $('json').hidden = false;
    try {
        await navigator.clipboard.writeText(text);
        $('copied').textContent = 'Copied.';
    } catch {
        $('json').select();
        $('copied').textContent = 'The browser refuses to copy: take the text below.';
    }
};

try {
    // After the first paint.
    web = await import('./gradclip_web.js');
    await web.default();
    showWhy(JSON.parse(web.why()));
    enable();
    await open();
    if (gpu) showWhy(JSON.parse(await gpu.why()));
} catch (error) {
    $('device-state').textContent = error?.name === 'DeviceLost' ? $('device-state').textContent : `The page cannot start: ${error?.message ?? error}`;
}
enable();
