import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from faceless.randomness import Rng, permutation, philox4x32

words = st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4)


def hexes(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # kat_vectors of Random123, the reference implementation.
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert philox4x32(torch.tensor(hexes(counter)), tuple(hexes(key))).tolist() == hexes(expected)


@given(words, st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)))
def test_philox_equals_big_integer_arithmetic(counter, key):
    """The same rounds in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    assert philox4x32(torch.tensor(counter), key).tolist() == [c0, c1, c2, c3]


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**63),
    step=st.integers(0, 2**40),
    indices=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    count=st.integers(1, 9),
)
def test_rows_depend_on_their_index_only(seed, step, indices, cut, count):
    whole = Rng.of(seed, "faces", indices, step=step)
    parts = [Rng.of(seed, "faces", part, step=step) for part in (indices[:cut], indices[cut:])]
    order = torch.arange(len(indices)).flip(0)
    for draw in (lambda r: r.normal(count), lambda r: r.uniform(count, low=-2, high=3), lambda r: r.integers(7, count)):
        rows = draw(whole)
        assert torch.equal(rows, torch.cat([draw(part) for part in parts]))
        assert torch.equal(rows.flip(0), draw(whole.rows(order)))


def test_neighbours_in_every_direction_differ():
    base = Rng.of(0, "a", range(8), step=5).bits(16)
    others = [
        Rng.of(1, "a", range(8), step=5),
        Rng.of(0, "b", range(8), step=5),
        Rng.of(0, "a", range(8), step=6),
        Rng.of(0, "a", range(8), step=5 + 2**32),
        Rng.of(0, "a", range(8, 16), step=5),
        Rng.of(0, "a", range(8), step=5).child("b"),
        # Purposes that would collide if the key were a plain concatenation.
        Rng.of(11, "a", range(8), step=5),
        Rng.of(1, "1a", range(8), step=5),
    ]
    streams = [base, *(other.bits(16) for other in others)]
    values = torch.stack(streams).flatten().tolist()
    assert len(set(values)) == len(values)


def test_uniform_moments_and_distribution():
    draw = Rng.of(3, "u", range(1000)).uniform(200).numpy().ravel()
    assert draw.min() >= 0.0
    assert draw.max() < 1.0
    assert stats.kstest(draw, "uniform").pvalue > 1e-3


def test_normal_moments_and_distribution():
    draw = Rng.of(4, "n", range(1000)).normal(199).double().numpy().ravel()  # odd: half a Box-Muller pair is cut
    n = len(draw)
    # Mean, variance, skewness and kurtosis within 4 standard errors of a normal sample.
    assert abs(draw.mean()) < 4 / math.sqrt(n)
    assert abs(draw.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(draw)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(draw)) < 4 * math.sqrt(24 / n)
    assert stats.kstest(draw, "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: Rng.of(0, "a", range(200)), lambda: Rng.of(0, "b", range(200))),
        (lambda: Rng.of(0, "a", range(200)), lambda: Rng.of(1, "a", range(200))),
        (lambda: Rng.of(0, "a", range(200), step=1), lambda: Rng.of(0, "a", range(200), step=2)),
        (lambda: Rng.of(0, "a", range(200)), lambda: Rng.of(0, "a", range(200, 400))),
    ],
    ids=["purpose", "seed", "step", "index"],
)
def test_streams_are_uncorrelated(first, second):
    a, b = first().normal(500).flatten().numpy(), second().normal(500).flatten().numpy()
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))


def test_elements_of_a_row_are_uncorrelated():
    draw = Rng.of(0, "a", range(20_000)).normal(8).numpy()
    off = np.corrcoef(draw.T) - np.eye(8)
    assert np.abs(off).max() < 5 / math.sqrt(len(draw))


@given(st.integers(2, 1000))
@settings(deadline=None, max_examples=30)
def test_integers_stay_in_range_and_reach_all(high):
    draw = Rng.of(0, "i", range(200)).integers(high, 100)
    assert draw.min() >= 0
    assert draw.max() < high
    counts = np.bincount(draw.flatten().numpy(), minlength=high)
    assert stats.chisquare(counts).pvalue > 1e-6


@given(st.integers(0, 500), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_permutation_is_one(size, epoch):
    assert sorted(permutation(0, "p", size, epoch).tolist()) == list(range(size))


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor made had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)))])
        return out


def test_a_large_permutation_is_the_same_and_takes_no_more_memory_than_it_must():
    size = (1 << 18) + 3
    bits = Rng.of(5, "p", torch.arange(size), step=2).bits(2)
    expected = torch.argsort((bits[:, 0] << 31) ^ bits[:, 1], stable=True)
    with Largest() as largest:
        found = permutation(5, "p", size, 2)
    assert torch.equal(found, expected)
    assert largest.numbers == size


@pytest.mark.parametrize("numbers", [range(5), range(7, 40, 3), range(4, 0, -1), range(3, 1), range(0)])
def test_ranges_are_the_numbers_they_hold(numbers):
    assert Rng.of(0, "r", numbers).indices.tolist() == list(numbers)


def test_a_long_range_does_not_become_python_numbers():
    tracemalloc.start()
    Rng.of(0, "r", range(1 << 19))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 1 << 20


def test_permutations_of_epochs_differ_and_repeat():
    assert not torch.equal(permutation(0, "p", 100, 0), permutation(0, "p", 100, 1))
    assert torch.equal(permutation(0, "p", 100, 7), permutation(0, "p", 100, 7))


def test_scalar_shapes():
    rng = Rng.of(0, "s", range(5))
    assert rng.normal().shape == rng.uniform().shape == rng.integers(3).shape == (5,)
    assert Rng.of(0, "s", []).normal(3).shape == (0, 3)
