"""How a sparse product is computed."""
