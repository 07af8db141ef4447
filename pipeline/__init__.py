"""What a person touches: the command line, the configuration, the stages and the report."""
