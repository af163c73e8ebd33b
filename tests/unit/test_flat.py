"""Exact search: the same documents and the same scores as brute force in float64, to the last bit and tie."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamicrag.models.device import pick_dtype
from dynamicrag.search import candidates, exact, inner_products
from dynamicrag.search.exact import ExactIndex
from dynamicrag.search.inner_products import best_first
from dynamicrag.search.rounding import MISSING


def brute_force(vectors, queries, k):
    """float64 inner products, rounded to float32. Equal scores are ordered by position."""
    scores = (queries.astype(np.float64)[:, None] * vectors.astype(np.float64)).sum(axis=2).astype(np.float32)
    return best_first(scores, np.broadcast_to(np.arange(len(vectors)), scores.shape), min(k, len(vectors)))


def assert_exact(vectors, queries, k, cuts=(), **given):
    scores, positions = ExactIndex(np.split(vectors, list(cuts)), **given).search(queries, k)
    expected_scores, expected_positions = brute_force(vectors, queries, k)
    np.testing.assert_array_equal(positions, expected_positions)
    np.testing.assert_array_equal(scores, expected_scores)
    assert scores.dtype == np.float32 and positions.dtype == np.int64


@pytest.fixture(params=["float32", pick_dtype("auto", "cpu")], ids=str, autouse=True)
def rough(request, monkeypatch):
    """The type of the first comparison does not change the result."""
    dtype = getattr(torch, request.param) if isinstance(request.param, str) else request.param
    monkeypatch.setattr("dynamicrag.models.device.pick_dtype", lambda name, device: dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(exact, "UNIT_VECTORS", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(exact, "TILE_SCORES", {"cpu": 640, "cuda": 640})
    monkeypatch.setattr(exact, "BLOCK_VECTORS", 150)
    monkeypatch.setattr(candidates, "WAITING", 1)
    monkeypatch.setattr(inner_products, "RESCORED", {"cpu": 7, "cuda": 7})


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 5, 63, 64, 65, 700, 5000])
def test_every_k(small_tiles, k):
    rng = np.random.default_rng(0)
    assert_exact(normal(rng, 700, 24).astype(np.float16), normal(rng, 9, 24), k, cuts=(1, 333))


def test_at_the_real_tile_size():
    rng = np.random.default_rng(1)
    assert_exact(normal(rng, 9000, 16).astype(np.float16), normal(rng, 40, 16), 20)


def test_vectors_that_low_precision_cannot_tell_apart(small_tiles):
    """A thousand vectors that are the same vector in bfloat16. The best ones are at random places."""
    rng = np.random.default_rng(2)
    vectors = (1 + rng.integers(-2, 3, (1000, 32)) / 2048).astype(np.float16)
    assert_exact(vectors, 1 + normal(rng, 5, 32) / 1000, 10)


def test_scores_beyond_half_precision(small_tiles):
    rng = np.random.default_rng(7)
    vectors = normal(rng, 500, 16)
    assert_exact((vectors * 3000).astype(np.float16), normal(rng, 5, 16) * 1000, 20)
    assert_exact((vectors / 1000).astype(np.float16), normal(rng, 5, 16) / 1e6, 20)


def test_many_questions_in_small_tiles(small_tiles, monkeypatch):
    monkeypatch.setattr(exact, "TILE_SCORES", {"cpu": 100, "cuda": 100})
    rng = np.random.default_rng(8)
    assert_exact(normal(rng, 300, 8).astype(np.float16), normal(rng, 70, 8), 5)


def test_numbers_that_a_processor_takes_as_zero(small_tiles):
    """Multiplied in bfloat16, the smallest numbers of float16 count as zero. They decide here, alone or behind larger ones."""
    rng = np.random.default_rng(9)
    vectors = rng.integers(-60, 61, (900, 24)) * 2.0**-20
    queries = normal(rng, 6, 24)
    assert_exact(vectors.astype(np.float16), queries, 20)
    vectors[:, 0], queries[:, 0] = 1 + rng.integers(0, 2, 900) / 1024, 0.01
    assert_exact(vectors.astype(np.float16), queries, 20)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_queries_of_every_size_and_scores_of_one_sign(small_tiles, sign, scale):
    rng = np.random.default_rng(10)
    vectors = np.abs(normal(rng, 700, 16)).astype(np.float16)
    queries = (sign * np.abs(normal(rng, 5, 16)) * scale).astype(np.float32)
    assert_exact(vectors, queries, 40)
    assert_exact(np.concatenate([vectors, -vectors]), queries, 800)


@pytest.mark.parametrize("best_at", [0, 63, 70, 900])
@pytest.mark.parametrize("rounded", ["query", "vectors"])
def test_the_best_where_rounding_hides_it_most(small_tiles, best_at, rounded):
    """Rounding to bfloat16 adds 1 to the score of every vector except the best one, which loses 1."""
    width = 512
    pattern = np.where(np.arange(width) % 2, 1.0, -1.0)
    fine = pattern / 512  # rounding removes this from 1 + fine
    if rounded == "query":
        # The second one is rounded like this after it was multiplied.
        queries, others, best = np.stack([1 + pattern / 520, (1 + pattern / 520) / (MISSING / 2.0**112)]), -pattern, pattern
    else:
        queries, others, best = pattern[None].repeat(2, axis=0), 1 - fine, 1 + fine
    queries = np.append(queries, np.ones((2, 1)), axis=1).astype(np.float32)
    vectors = np.tile(np.append(others, 0.0), (1000, 1))
    vectors[best_at] = np.append(best, -1.9)
    for stored in (np.float16, np.float32):
        assert_exact(vectors.astype(stored), queries, 1)
        assert (ExactIndex([vectors.astype(stored)]).search(queries, 1)[1] == best_at).all()


def test_ties_are_in_the_order_of_the_vectors(small_tiles):
    rng = np.random.default_rng(3)
    distinct = normal(rng, 7, 16).astype(np.float16)
    vectors = distinct[rng.integers(0, 7, 900)]
    assert_exact(vectors, normal(rng, 11, 16), 200, cuts=(450,))
    assert_exact(np.zeros((300, 16), np.float16), normal(rng, 3, 16), 70)


def test_lengths_of_every_size(small_tiles):
    """One long vector must not hide its neighbours, and short ones must not be lost in the rounding of long ones."""
    rng = np.random.default_rng(4)
    vectors = normal(rng, 600, 16) * 10.0 ** rng.uniform(-3, 2, (600, 1))
    assert_exact(vectors.astype(np.float16), normal(rng, 8, 16) * 5, 30)
    assert_exact(vectors.astype(np.float32), np.concatenate([normal(rng, 3, 16), np.zeros((1, 16), np.float32)]), 30)


GPUS = tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


@pytest.mark.parametrize("devices", [("cpu", "cpu"), ("cpu",) * 5, *[GPUS, GPUS[:1]] * bool(GPUS)], ids="+".join)
def test_blocks_divided_over_devices(small_tiles, devices):
    rng = np.random.default_rng(5)
    vectors = np.repeat(normal(rng, 250, 16), 3, axis=0).astype(np.float16)
    assert_exact(vectors, normal(rng, 6, 16), 40, cuts=(100, 101, 500), devices=devices)


def test_a_second_search_over_the_same_index(small_tiles):
    rng = np.random.default_rng(6)
    vectors, index = normal(rng, 500, 16).astype(np.float16), None
    index = ExactIndex([vectors])
    for _ in range(3):
        queries = normal(rng, 4, 16)
        np.testing.assert_array_equal(index.search(queries, 9)[1], brute_force(vectors, queries, 9)[1])
    whole = normal(rng, 50, 16)
    scores, positions = index.search(whole, 9)
    for row in range(50):
        alone = index.search(whole[row : row + 1], 9)
        assert (alone[0][0] == scores[row]).all() and (alone[1][0] == positions[row]).all(), "batches change nothing"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_anything(data):
    seed, count, width, questions, k = (data.draw(st.integers(1, most)) for most in (10_000, 300, 40, 12, 320))
    rng = np.random.default_rng(seed)
    values = rng.choice([0.0, 1.0, -1.0, 0.333, 2.0**-10, 65.0], (count, width)).astype(np.float16)
    cut = data.draw(st.integers(0, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "UNIT_VECTORS", {"cpu": data.draw(st.sampled_from([1, 13, 64]))})
        patch.setattr(exact, "TILE_SCORES", {"cpu": data.draw(st.sampled_from([1, 300, 2000]))})
        patch.setattr(exact, "BLOCK_VECTORS", data.draw(st.sampled_from([1, 50, 128, 1000])))
        assert_exact(values, rng.choice([0.0, 1.0, -0.5, 3.0], (questions, width)).astype(np.float32), k, cuts=(cut,))


def test_comparing_many_candidates_takes_no_more_memory_than_a_few(rough):
    """It once took 360 MB per worker: results that were kept between freed vectors spread them over the heap."""
    measured = """
import resource, torch
from dynamicrag.search.inner_products import inner_products
vectors, queries = torch.ones(20_000, 768, dtype=torch.float16), torch.ones(64, 768, dtype=torch.float64)
row, query = torch.arange(60_000) % 20_000, torch.arange(60_000) % 64
inner_products(vectors, row[:600], queries, query[:600])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inner_products(vectors, row, queries, query)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert float(done.stdout) < 50


def test_the_first_search_keeps_nothing_but_its_bounds(rough):
    """It once took 10 GB for 21 million vectors: bounds that were kept between freed vectors spread them over the heap."""
    measured = """
import resource, numpy as np
from dynamicrag.search import exact
exact.UNIT_VECTORS = {"cpu": 64}
vectors, queries = np.ones((80_000, 768), np.float16), np.ones((1, 768), np.float32)
vectors[:, 0] = np.arange(80_000) / 80_000 * 99
exact.ExactIndex([vectors[:20_000]]).search(queries, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
exact.ExactIndex([vectors]).search(queries, 1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert float(done.stdout) < 50
