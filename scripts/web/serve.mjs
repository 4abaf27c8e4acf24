// Serves a folder to this machine: node serve.mjs FOLDER PORT. `serve` returns a server that listens.

import { createServer } from 'node:http';
import { readFile } from 'node:fs/promises';
import { extname, join, normalize } from 'node:path';
import { fileURLToPath } from 'node:url';

const types = { '.html': 'text/html', '.css': 'text/css', '.js': 'text/javascript', '.wasm': 'application/wasm' };

export const serve = (folder, port) => {
    const server = createServer(async (request, response) => {
        // Normalised, a path that begins with / cannot leave the folder.
        const path = normalize(decodeURI(new URL(request.url, 'http://localhost').pathname));
        try {
            const body = await readFile(join(folder, path.endsWith('/') ? `${path}index.html` : path));
            response.writeHead(200, { 'content-type': types[extname(path)] ?? 'text/html' }).end(body);
        } catch {
            response.writeHead(404).end();
        }
    });
    return new Promise((done, fail) => {
        server.once('error', fail);
        server.listen(port, 'localhost', () => done(server));
    });
};

if (process.argv[1] === fileURLToPath(import.meta.url)) {
    const [folder, port] = process.argv.slice(2);
    try {
        await serve(folder, Number(port));
        console.log(`the page is at http://localhost:${port}; end with Ctrl+C`);
    } catch (error) {
        console.error(`error: ${error.message}`);
        process.exit(1);
    }
}
