"""From a trained network to a file that others run: export and quantisation. Their packages are the extra `segfast[deploy]`."""

import importlib

_NAMES = {
    "artefact": ("Artefact", "load"),
    "export": ("TENSORRT", "Exported", "export_executorch", "export_onnx", "export_program", "operators"),
    "int8": (
        "Quantized",
        "load_quantized",
        "load_weights_only",
        "quantize",
        "quantize_aware",
        "quantize_onnx",
        "save_quantized",
        "save_weights_only",
        "sensitivity",
    ),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)


def __getattr__(name: str):
    # What quantises need not be imported by whoever loads a file.
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"segfast.deploy.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
