"""What was seen of each layer; `tnm_pipeline.export.verdict` says what it means."""
