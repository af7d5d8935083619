"""Work on threads: all of it, in order, at the same time, and its errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from faceless.threads import each


@pytest.fixture
def four() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_items_are_worked_on_together_and_come_back_in_order(four: None) -> None:
    together = threading.Barrier(4)  # passes only when four threads wait at once

    def work(item: int) -> int:
        together.wait(timeout=60)
        return item * item

    assert each(work, range(8)) == [item * item for item in range(8)]


def test_an_error_of_any_item_is_raised(four: None) -> None:
    with pytest.raises(ZeroDivisionError):
        each(lambda item: 1 / (item - 5), range(8))


def test_few_items_need_no_threads() -> None:
    assert each(lambda _: threading.current_thread(), range(3)) == [threading.current_thread()] * 3
