"""The inference server: `python -m runtime.serve`. Open Inference Protocol over REST and gRPC, dynamic batching."""
