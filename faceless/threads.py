"""Work on a few threads, for what does not hold the interpreter while it works, such as decoders of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
MOST = 8  # more decode no faster: opening an image holds the interpreter


def each(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``work`` of every item, in their order, on as many threads as PyTorch computes with.

    The threads end with the call, so that a process may be forked between two.

    >>> each(lambda x: x * x, range(4))
    [0, 1, 4, 9]
    """
    threads = min(MOST, torch.get_num_threads(), len(items) // 2)
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, "each") as pool:
        return list(pool.map(work, items))
