"""One TensorRT build in a process of its own; `tnm_pipeline.export.tensorrt` is the entry."""
