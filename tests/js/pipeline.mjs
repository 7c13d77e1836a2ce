// node pipeline.mjs FOLDER_WITH_NODE_MODULES HF_FOLDER TEXTS.json: prints the labels and scores of transformers.js, offline.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, dirname, join } from 'node:path';

const [folder, hub, texts] = process.argv.slice(2);
const { env, pipeline } = createRequire(join(folder, 'package.json'))('@huggingface/transformers');
env.allowRemoteModels = false;
env.localModelPath = dirname(hub);
const classify = await pipeline('text-classification', basename(hub), { dtype: 'fp32', device: 'cpu' });
const found = [];
for (const text of JSON.parse(readFileSync(texts, 'utf8'))) {
  found.push(await classify(text, { top_k: null }));
}
console.log(JSON.stringify({ version: env.version, found }));
