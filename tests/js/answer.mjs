// A model's outputs for feeds of int64, one call each. Runs in Node and in browsers.

/** `model` is what InferenceSession.create takes; `feeds` are [{name: [[numbers]]}]. Returns the first output of each call as rows. */
export async function answer(ort, model, options, feeds) {
  const session = await ort.InferenceSession.create(model, { ...options, intraOpNumThreads: 1, interOpNumThreads: 1 });
  const found = [];
  for (const feed of feeds) {
    const tensors = {};
    for (const name of session.inputNames) {
      const rows = feed[name];
      tensors[name] = new ort.Tensor('int64', BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
    }
    const output = (await session.run(tensors))[session.outputNames[0]];
    const [batch, width] = output.dims;
    found.push(Array.from({ length: batch }, (_, i) => Array.from(output.data.slice(i * width, (i + 1) * width))));
  }
  return { version: Object.values(ort.env.versions ?? {}).at(-1) ?? '', isolated: globalThis.crossOriginIsolated ?? null, outputs: found };
}
