"""gRPC: HTTP/2 connections, the methods of the Open Inference Protocol, health and reflection."""
