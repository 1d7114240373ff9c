"""From a trained network to a file that others run: export and quantisation. Their packages are the extra `segfast[deploy]`."""

import importlib

_WHERE = {
    "Artefact": "artefact", "load": "artefact", "TENSORRT": "export", "Exported": "export", "export_onnx": "export",
    "export_program": "export", "operators": "export", "Calibration": "quantize", "Quantized": "quantize",
    "load_quantized": "quantize", "quantize": "quantize", "quantize_aware": "quantize", "quantize_onnx": "quantize",
    "save_quantized": "quantize", "sensitivity": "quantize",
}  # fmt: skip
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    # ONNX, ONNX Runtime and torchao take seconds to import: whoever loads a file does not wait for what quantises it.
    if name in _WHERE:
        return getattr(importlib.import_module(f"segfast.deploy.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
