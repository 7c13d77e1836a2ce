// One .onnx in one session of an ONNX Runtime for JavaScript, one thread: the same figures as session.py. Runs in Node and in browsers.

const TOKENS = 128, WARMUP = 3, LEAST = 15;

/** `ort` is the module, `model` what its InferenceSession.create takes, `options` are the session's. */
export async function measure(ort, model, options, seconds) {
  const started = performance.now();
  const session = await ort.InferenceSession.create(model, { ...options, intraOpNumThreads: 1, interOpNumThreads: 1 });
  const load_s = (performance.now() - started) / 1000;
  const values = {
    input_ids: (_, i) => BigInt(((i * 7919) % 19000) + 1000),
    attention_mask: () => 1n,
    token_type_ids: () => 0n,
  };
  const feeds = {};
  for (const name of session.inputNames) {
    feeds[name] = new ort.Tensor('int64', BigInt64Array.from({ length: TOKENS }, values[name]), [1, TOKENS]);
  }
  const times = [];
  const end = performance.now() + 1000 * seconds;
  let outputs;
  while (times.length < WARMUP + LEAST || performance.now() < end) {
    const start = performance.now();
    outputs = await session.run(feeds);
    times.push(performance.now() - start);
  }
  const counted = times.slice(WARMUP).sort((a, b) => a - b);
  const { data } = outputs[session.outputNames[0]];
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
  const version = Object.values(ort.env.versions ?? {}).at(-1) ?? '';
  return { version, load_s, p50_ms: counted[counted.length >> 1], n: counted.length, outputs: hex };
}
