// node node.mjs FOLDER_WITH_NODE_MODULES FILE.onnx FEEDS.json: prints what `answer` gives.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { answer } from './answer.mjs';

const [folder, file, feeds] = process.argv.slice(2);
const ort = createRequire(join(folder, 'package.json'))('onnxruntime-node');
console.log(JSON.stringify(await answer(ort, file, { executionProviders: ['cpu'] }, JSON.parse(readFileSync(feeds, 'utf8')))));
