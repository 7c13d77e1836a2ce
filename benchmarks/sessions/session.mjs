// node session.mjs FOLDER_WITH_NODE_MODULES PACKAGE FILE.onnx SECONDS: prints what session.py prints. Source: onnxruntime-common's API.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { measure } from './measure.mjs';

const [folder, name, file, seconds] = process.argv.slice(2);
const require = createRequire(join(folder, 'package.json'));
const ort = require(name);
const web = name === 'onnxruntime-web';
if (web) ort.env.wasm.numThreads = 1;
const found = await measure(ort, web ? new Uint8Array(readFileSync(file)) : file, { executionProviders: [web ? 'wasm' : 'cpu'] }, Number(seconds));
const peak = /VmHWM:\s+(\d+)/.exec(readFileSync('/proc/self/status', 'utf8')); // maxRSS holds that of the process that started this one
console.log(JSON.stringify({ ...found, peak_bytes: 1024 * Number(peak[1]) }));
