"""Whether an int8 file computes what `train-quantized` saw: predictions on the dev set, by the rounded PyTorch model and by the file, row by row.

    python benchmarks/agreement.py CHECKPOINT TARGET_DIR --task mrpc --data-dir glue [--static] [--samples 128]

CHECKPOINT is the folder that `train-quantized` wrote (`files/` below the store's artifacts/KEY; a run with --train-only names the keys), TARGET_DIR the
target's folder of a run. Prints how many predictions agree, and how far logits lie apart, beside the same of the model in float.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.fake import FakeQuantized
from onnxsqueeze.nn.training import predict
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.int8 import seven_bits
from onnxsqueeze.tasks.open import open_task
from onnxsqueeze.tasks.rows import spread
from onnxsqueeze.tasks.settings import TaskSettings
from onnxsqueeze.tokens import Encoder, pad


def main() -> None:
    """Print one line."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("checkpoint", type=Path)
    cli.add_argument("target", type=Path)
    cli.add_argument("--task", required=True)
    cli.add_argument("--data-dir", type=Path)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--static", action="store_true", help="trained with activations: static")
    cli.add_argument("--samples", type=int, default=128)
    asked = cli.parse_args()
    task = open_task(TaskSettings(name=asked.task), data_dir=asked.data_dir, seed=asked.seed)
    dev, length = task.dev()[0], task.info.max_length
    encoder = Encoder(asked.target, length)
    rows = calibration.encode(encoder, dev.rows)
    got = np.concatenate(calibration.logits(asked.target / "model.onnx", [pad([row], encoder.pad_id) for row in rows], threads=1))
    model, family = checkpoint.load(asked.checkpoint, task.info)
    examples = encode(asked.checkpoint, dev.rows, length)
    in_float = predict(model, family, examples)
    with FakeQuantized(model, per_channel=True, bits=7 if seven_bits("auto") else 8, static=asked.static) as fake:
        if asked.static:
            calibrated = calibration.encode(encoder, spread(task.train.rows, asked.samples))
            width = max(map(len, calibrated))
            fake.measure({name: pad([row], encoder.pad_id, width)[name] for name in family.inputs()} for row in calibrated)
        seen = predict(model, family, examples)
    for name, logits in (("what training saw", seen), ("the model in float", in_float)):
        same = int((got.argmax(1) == logits.argmax(1)).sum())
        apart = float(np.sqrt(((got - logits) ** 2).mean()))
        print(
            f"{dev.source}, {len(got)} rows: the file and {name}: {same} predictions agree ({same / len(got):.2%}), logits {apart:.4f} apart (rms)"
        )


if __name__ == "__main__":
    main()
