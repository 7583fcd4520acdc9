"""The Open Inference Protocol's words: signatures, tensors in JSON and bytes, documents about server and models."""
