"""Checkpoint -> ONNX -> precision -> TensorRT engine -> Triton repository."""
