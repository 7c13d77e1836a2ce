"""Which number format training runs in, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from onnxsqueeze.environment import cpu_features

Precision = Literal["auto", "fp32", "bf16"]

# Without these instructions a bf16 product is emulated and slower than fp32.
_BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16"})


def effective(precision: Precision, *, cuda: bool, features: frozenset[str] | None = None) -> Literal["fp32", "bf16"]:
    """What ``auto`` means: bf16 on a GPU or a CPU that multiplies it natively, else fp32. ``features``: of the CPU; default this one's."""
    if precision != "auto":
        return precision
    return "bf16" if cuda or _BF16_FEATURES & (cpu_features() if features is None else features) else "fp32"


def machine_bound(precision: Precision) -> bool:
    """Whether trained bytes depend on the machine: bf16 rounding differs between CPUs, and a GPU orders its sums as it likes.

    Asks the operating system for the GPU, not torch: plans must not pay for its import.
    """
    return Path("/dev/nvidiactl").exists() or effective(precision, cuda=False) == "bf16"
