"""Sessions of graphs that hold a tokenizer: they need onnxruntime-extensions, an optional library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze.errors import UsageError

if TYPE_CHECKING:
    import onnxruntime as ort


def require_extensions() -> Any:
    """The module onnxruntime_extensions. Raises UsageError where it is not installed."""
    try:
        import onnxruntime_extensions
    except ImportError as error:
        raise UsageError(
            "--text: onnxruntime-extensions is not installed: it has the operators of a tokenizer",
            remedy="pip install 'onnxsqueeze[text]'",
        ) from error
    return onnxruntime_extensions


def open_text(
    model: bytes, weights: Path | None = None, *, threads: int = 1, provider: str = "CPUExecutionProvider"
) -> ort.InferenceSession:
    """A session of an .onnx file's bytes, its external data in the folder ``weights``. Raises UsageError as `require_extensions` does."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.register_custom_ops_library(require_extensions().get_library_path())
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only; changes nothing that runs
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.absolute()))
    return ort.InferenceSession(model, options, providers=list(dict.fromkeys([provider, "CPUExecutionProvider"])))
