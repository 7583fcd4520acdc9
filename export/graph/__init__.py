"""Every look into an ONNX file: capture it from torch, read it, check it."""
