"""EmbeddingMemory against a deque, and what must survive a checkpoint."""

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.memory import EmbeddingMemory


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 23), max_size=8))
def test_holds_the_last_rows_like_a_deque(size, batches):
    memory, expected, count = EmbeddingMemory(size, 2, initial="empty"), deque(maxlen=size), 0
    slots: dict[int, float] = {}
    for n in batches:
        values = torch.arange(count, count + n, dtype=torch.float32)
        memory.push(torch.stack((values, -values), 1))
        for value in values.tolist():
            expected.append(value)
            slots[int(value) % size] = value  # a ring: the i-th row ever lies at i mod K
        count += n
        assert len(memory) == len(expected) == memory.filled
        assert memory.pointer == count % size
        assert sorted(memory.valid()[:, 0].tolist()) == list(expected)
        assert memory.valid()[:, 0].tolist() == [slots[i] for i in range(len(expected))]
        assert torch.equal(memory.valid()[:, 1], -memory.valid()[:, 0])


def test_random_rows_are_valid_unit_reproducible_and_replaced_in_order():
    memory, again, other = EmbeddingMemory(64, 32), EmbeddingMemory(64, 32), EmbeddingMemory(64, 32, seed=1)
    assert len(memory) == 64 and not memory.full
    assert torch.equal(memory.rows, again.rows) and not torch.equal(memory.rows, other.rows)
    torch.testing.assert_close(memory.rows.norm(dim=1), torch.ones(64))
    cosines = memory.rows @ memory.rows.T - torch.eye(64)
    assert cosines.abs().max() < 0.85  # independent directions in 32 dimensions: 4.8 standard deviations
    assert cosines.mean().abs() < 0.02
    memory.push(torch.zeros(10, 32))
    assert torch.equal(memory.rows[10:], again.rows[10:]) and not memory.rows[:10].any()
    memory.push(torch.zeros(54, 32))
    assert memory.full


def test_prefix_of_a_larger_random_memory_is_the_smaller_one():
    assert torch.equal(EmbeddingMemory(64, 8).rows[:16], EmbeddingMemory(16, 8).rows)


def test_what_was_read_does_not_change_when_rows_are_pushed():
    memory = EmbeddingMemory(4, 2)
    weights = torch.randn(3, 2, requires_grad=True)
    before = memory.valid()
    loss = (weights @ before.T).sum()
    expected = before.sum(0).expand(3, 2).clone()
    memory.push(torch.full((4, 2), 9.0))
    loss.backward()
    torch.testing.assert_close(weights.grad, expected)


@pytest.mark.parametrize("similar", [True, False])
def test_replace_takes_the_most_or_least_similar_place(similar):
    memory = EmbeddingMemory(6, 5, initial="empty")
    filling = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    memory.replace(filling[:4], similar=similar)
    memory.replace(filling[4:], similar=similar)
    assert torch.equal(memory.rows, filling)  # until full it is a ring
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    expected = [row.clone() for row in filling]
    for row in rows:  # later rows win
        cosines = [float(row @ old / row.norm()) for old in filling]
        place = max(range(6), key=cosines.__getitem__) if similar else min(range(6), key=cosines.__getitem__)
        expected[place] = row
    memory.replace(rows, similar=similar)
    assert torch.equal(memory.rows, torch.stack(expected))
    memory.replace(rows[:0], similar=similar)
    assert torch.equal(memory.rows, torch.stack(expected))


def test_a_checkpoint_is_complete(tmp_path):
    memory, rows = EmbeddingMemory(5, 3, initial="empty"), torch.randn(20, 3)
    memory.push(rows[:7])
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    resumed = EmbeddingMemory(5, 3, initial="empty")
    resumed.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for memory_ in (memory, resumed):
        memory_.push(rows[7:10])
    assert torch.equal(memory.rows, resumed.rows)
    assert (memory.pointer, memory.filled) == (resumed.pointer, resumed.filled) == (0, 5)
    assert all(isinstance(value, torch.Tensor) for value in memory.state_dict().values())  # safetensors takes no other


def test_half_precision_rows_are_stored_in_float32_without_gradient():
    memory = EmbeddingMemory(4, 2, initial="empty")
    memory.push(torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16, requires_grad=True))
    assert memory.valid().dtype == torch.float32 and not memory.valid().requires_grad
    assert memory.valid().tolist() == [[1.5, -2.0]]


@pytest.mark.parametrize("bad", [{"size": 0}, {"dim": 0}, {"initial": "zeros"}])
def test_refuses_bad_arguments(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        EmbeddingMemory(**{"size": 4, "dim": 2} | bad)


def test_refuses_rows_of_another_dimension_and_impossible_states():
    memory = EmbeddingMemory(4, 2)
    with pytest.raises(ValueError, match="rows of 2"):
        memory.push(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="row 4"):
        memory.set_extra_state(torch.tensor([4, 0]))
