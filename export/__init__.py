"""From a sparse checkpoint to ONNX and TensorRT plans, and the proof that each step kept what it should."""
