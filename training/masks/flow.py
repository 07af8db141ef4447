"""Min-cost flow on networkx: the slow, trustworthy reference for transposable masks of any N:M.

The network of Hubara et al. 2021 (section 3.1): source -> each row with capacity N, each row -> each
column with capacity 1 and the negative weight as its cost, each column -> sink with capacity N. A flow of
N*M is a mask with N per row and column; the cheapest flow is the best mask.
"""

import networkx as nx
import numpy as np
import torch
from torch import Tensor

# networkx's network simplex hangs, or calls a feasible problem infeasible, on float costs: scale to integers.
_SCALE = 2**40


def solve_flow(blocks: Tensor, n: int) -> Tensor:
    """The mask with exactly N kept in every row and column that keeps the largest sum, for each block.

    Weights are rounded to 2^-40 of the block's largest one; masks whose sums differ by less than that tie.

    Args:
        blocks: (B, M, M), non-negative floats.
        n: weights kept per row and column.

    Returns:
        (B, M, M) bool, on the device of `blocks`.
    """
    weights = blocks.detach().to("cpu", torch.float64).numpy()
    mask = np.zeros(weights.shape, dtype=bool)
    for index, block in enumerate(weights):
        mask[index] = _solve_block(block, n)
    return torch.from_numpy(mask).to(blocks.device)


def _solve_block(block: np.ndarray, n: int) -> np.ndarray:
    """One (M, M) float64 block; returns (M, M) bool."""
    m = block.shape[0]
    largest = block.max()
    costs = -np.rint(block / largest * _SCALE).astype(np.int64) if largest > 0 else np.zeros((m, m), np.int64)
    graph = nx.DiGraph()
    graph.add_node("source", demand=-n * m)
    graph.add_node("sink", demand=n * m)
    for i in range(m):
        graph.add_edge("source", ("row", i), capacity=n)
        graph.add_edge(("column", i), "sink", capacity=n)
        for j in range(m):
            graph.add_edge(("row", i), ("column", j), capacity=1, weight=int(costs[i, j]))
    flow = nx.min_cost_flow(graph)
    mask = np.zeros((m, m), dtype=bool)
    for i in range(m):
        for j in range(m):
            mask[i, j] = flow["row", i]["column", j] == 1
    return mask
