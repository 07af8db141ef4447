"""Production inference: load a verified artifact and run it. Imports neither torch nor a sibling package."""
