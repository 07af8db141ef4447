"""Compiled loops in several threads, as many as torch uses."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")

_ITEMS_PER_SHARE = 1 << 16  # below this a second thread costs more than it brings
_SHARES_PER_THREAD = 4  # so that a thread that was held up does not hold up the others


def share_out(work: Callable[[int, int], T], count: int, items: int) -> list[T]:
    """Call `work` with the bounds of consecutive shares, which are done in any order.

    Args:
        work: gets the first place and the one after the last; in a compiled loop, without the GIL.
        count: places there are.
        items: weights behind all of them.

    Returns:
        What `work` returned for each share, in no order; there is at least one.
    """
    shares = max(1, min(count, items // _ITEMS_PER_SHARE))
    threads = min(torch.get_num_threads(), shares)
    if threads == 1:
        return [work(0, count)]
    shares = min(shares, threads * _SHARES_PER_THREAD)
    bounds = [count * share // shares for share in range(shares + 1)]
    left = iter(list(pairwise(bounds)))  # each thread takes the next share when it has done one

    def work_on() -> list[T]:
        return [work(first, last) for first, last in left]

    others = [_pool(threads - 1).submit(work_on) for _ in range(threads - 1)]
    done = work_on()
    for other in others:
        done += other.result()
    return done


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tnm-masks")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads
