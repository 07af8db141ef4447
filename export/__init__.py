"""Torch to ONNX to TensorRT plan, and the proof that each step kept what it should."""
