"""Everything that changes weights: masks, sparse layers, training and conversion."""
