"""Parts about exact search: the results equal those of brute force in float64; the time of each step."""

import time
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np

from gpu_check.data import passage_vectors, questions_about
from gpu_check.part import Run, Skipped

KS = (1, 50, 500)
CHUNK = 65_536  # vectors per step of the brute-force comparison


# ---------------------------------------------------------------- exactness


def exactness(run: Run) -> None:
    """Check ExactIndex against brute force: equal positions and equal bits."""
    import torch

    device = run.device
    count, width, asked = (20_000, 48, 24) if run.dry else (1_000_000, 768, 256)
    # Vectors of several kinds
    made = passage_vectors(count, width, device)
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape: int, dtype=torch.float16):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def check(vectors, **options) -> dict:
        return check_exact(vectors, questions_about(vectors, asked), device, KS, **options)

    def mixed():
        vectors = normal(count, width).float() * torch.exp(2 * torch.randn(count, 1, generator=generator, device=device))
        vectors[::1009] = 0
        return vectors.clamp(-60_000, 60_000).half()

    def repeated():
        vectors, tenth = made.clone(), count // 10
        order = torch.randperm(count, generator=generator, device=device)
        vectors[order[:tenth]] = vectors[order[-tenth:]]
        return vectors

    def near():
        centres = normal(64, width, dtype=torch.float32)
        which = torch.randint(64, (count,), generator=generator, device=device)
        return (centres[which] + 0.02 * normal(count, width, dtype=torch.float32)).half()

    # The cases
    small = {"BLOCK_VECTORS": 2_048 if run.dry else 1 << 17}
    run.case("topics, float16", lambda: check(made))
    run.case("gaussian, float16", lambda: check(normal(count, width)))
    run.case("near copies of 64 vectors", lambda: check(near()))
    run.case("long and short", lambda: check(mixed()))
    run.case("a tenth twice", lambda: check(repeated()))
    run.case("length no multiple of 64, uneven shards", lambda: check(made[: count - 37], cuts=(count // 3 + 5, count // 2 + 1)))
    run.case("gaussian, float32", lambda: check(normal(count, width, dtype=torch.float32)))
    run.case("not finite", lambda: _not_finite(made, asked, device, small))
    run.case("half streamed from the host", lambda: _streamed(made, asked, device, small))
    run.case("two parts on one device", lambda: check(repeated(), devices=(("cuda:0", "cuda:0") if device == "cuda" else ("cpu", "cpu"))))


def check_exact(vectors, queries, device: str, ks, cuts=(), devices=None, flat_settings=None) -> dict:
    """Search `vectors` (a tensor) and compare with brute force for every k. Raises AssertionError for a difference.

    The last digits of float64 sums depend on their order. A position or a bit may therefore differ if two float64
    scores agree to 1e-12, or if a score lies between two floats. The figures include the number of such cases.
    """
    import torch

    from dynamicrag.search import exact

    arrays = np.split(vectors.cpu().numpy(), list(cuts))
    with _settings(exact, flat_settings or {}):
        index = exact.ExactIndex(arrays, devices or (device,))
        began = time.perf_counter()
        searched = {k: index.search(queries.cpu().numpy(), k) for k in ks}
        seconds = time.perf_counter() - began
    exact, best_scores, best_positions = brute_force(vectors, queries, min(max(ks), len(vectors)))
    within = 0
    for k, (scores, positions) in searched.items():
        assert scores.dtype == np.float32 and positions.dtype == np.int64 and scores.shape == positions.shape == (len(queries), min(k, len(vectors)))
        scores, positions = torch.from_numpy(scores).to(device), torch.from_numpy(positions).to(device)
        assert bool(((positions >= 0) & (positions < len(vectors))).all()), f"k {k}: a position is not that of a vector"
        ordered = positions.sort(dim=1).values
        assert bool((ordered[:, 1:] != ordered[:, :-1]).all()), f"k {k}: a vector is found twice"
        wanted, wanted_positions = best_scores[:, : scores.shape[1]], best_positions[:, : scores.shape[1]]
        mine, theirs = exact.gather(1, positions), exact.gather(1, wanted_positions)
        same_place = (positions == wanted_positions) | ((mine - theirs).abs() <= 1e-12 * theirs.abs())
        same_bits = (scores == wanted) | ((scores.double() - mine).abs() <= 0.5001 * _spacing(scores))
        wrong = int((~(same_place & same_bits)).sum())
        assert not wrong, f"k {k}: {wrong} of {scores.numel()} differ from brute force; the first at {(~(same_place & same_bits)).nonzero()[0].tolist()}"
        within += int(((positions != wanted_positions) | (scores != wanted)).sum())
    return {"compared": sum(result[0].size for result in searched.values()), "equal but for the order of a sum": within, "search_s": round(seconds, 3)}


def brute_force(vectors, queries, k: int):
    """Return float64 scores [n, count], and the k best as float32 scores and positions; equal scores by position."""
    import torch

    exact = torch.empty(len(queries), len(vectors), dtype=torch.float64, device=queries.device)
    for start in range(0, len(vectors), CHUNK):
        exact[:, start : start + CHUNK] = queries.double() @ vectors[start : start + CHUNK].double().T
    scores, positions = [], []
    for some in exact.split(32):
        best, order = some.float().sort(dim=1, descending=True, stable=True)
        scores.append(best[:, :k].clone())
        positions.append(order[:, :k].clone())
    return exact, torch.cat(scores), torch.cat(positions)


def _spacing(scores):
    """Return the distance to the next float32, as float64."""
    import torch

    magnitude = scores.abs()
    return torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)).double() - magnitude.double()


@contextmanager
def _settings(module, values: dict):
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch.object(module, name, value))
        yield


def _not_finite(made, asked: int, device: str, small: dict) -> dict:
    """Check that the error names the position of NaN and infinity in the last block."""
    from dynamicrag.search import exact
    from dynamicrag.search.inner_products import NotFiniteError

    position, queries = len(made) - 11, questions_about(made, asked).cpu().numpy()
    for value in (float("nan"), float("inf")):
        vectors = made.cpu().numpy().copy()
        vectors[position, 5] = value
        with _settings(exact, small):
            try:
                exact.ExactIndex([vectors], (device,)).search(queries, 5)
            except NotFiniteError as error:
                assert error.position == position, f"{value}: the error names {error.position}, not {position}"
            else:
                raise AssertionError(f"{value} in vector {position} was searched without an error")
    return {"position": position}


def _streamed(made, asked: int, device: str, small: dict) -> dict:
    """Check that the result is the same with half of the blocks on the host."""
    if device == "cpu":
        raise Skipped("a CPU maps its vectors; nothing is sent")
    import torch

    from dynamicrag.search import exact

    torch.cuda.empty_cache()
    size = small["BLOCK_VECTORS"]
    blocks = -(-len(made) // size)
    block_bytes = size * made.shape[1] * made.element_size()
    reserve = torch.cuda.mem_get_info(0)[0] - int((blocks / 2 + 0.5) * block_bytes)
    settings = {**small, "GPU_RESERVE": reserve}
    with _settings(exact, settings):
        index = exact.ExactIndex([made.cpu().numpy()], (device,))
    kinds = [block.vectors.device.type for part in index._parts for block in part.blocks]
    assert 0 < kinds.count("cpu") < len(kinds), f"all {len(kinds)} blocks are on {kinds[0]}"
    del index
    torch.cuda.empty_cache()
    return {"blocks": len(kinds), "on the host": kinds.count("cpu"), **check_exact(made, questions_about(made, asked), device, KS, flat_settings=settings)}


# ---------------------------------------------------------------- speed


def speed(run: Run) -> None:
    """Measure seconds per pass, and per step, for 21 million float16 vectors of width 768 (ten views of one array)."""
    import torch

    from dynamicrag.search import exact

    device = run.device
    count, width, views = (4_000, 32, 3) if run.dry else (2_100_000, 768, 10)
    # Vectors and questions
    made = passage_vectors(count, width, device)
    asked = (32, 64) if run.dry else (1024, 4096)
    questions = questions_about(made, asked[-1]).cpu().numpy()
    array = made.cpu().numpy()
    del made
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # Load the index
    began = time.perf_counter()
    index = exact.ExactIndex([array] * views, (device,))
    loaded = time.perf_counter() - began
    _, first = _seconds(lambda: index.search(questions[: asked[0]], 50))
    run.note(vectors=count * views, load_s=round(loaded, 2), first_pass_s=round(first, 2))
    found = {}

    # What is measured
    def passes(number: int, k: int) -> dict:
        seconds = []
        for _ in range(2):
            found[number, k], taken = _seconds(lambda: index.search(questions[:number], k))
            seconds.append(taken)
        return {"seconds": round(min(seconds), 3), "questions_per_s": round(number / min(seconds))}

    def same() -> dict:
        for k in (50, 500):
            few, many = found[asked[0], k], found[asked[1], k]
            assert all((few[side] == many[side][: asked[0]]).all() for side in (0, 1)), f"k {k}: the results depend on the questions of a pass"
        return {"equal": True}

    # The cases
    for number in asked:
        for k in (50, 500):
            run.case(f"{number} questions, k {k}", passes, number, k)
    run.case("the same result for fewer questions per pass", same)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        run.note(peak_gib=round(peak, 1))
        run.case("peak under 40 GiB", lambda: _under(peak, 40))
    for number, k in ((asked[0], 50), (asked[1], 50), (asked[1], 500)):
        run.case(f"split of {number} questions, k {k}", lambda number=number, k=k: _split(index, questions[:number], k))
    for size in (512, 16_384):
        run.case(f"RESCORED {size}", lambda size=size: _rescored(index, questions, size, found.get((asked[1], 500))))


def _under(value: float, most: float) -> None:
    assert value < most, f"{value:.1f} is not under {most}"


def _seconds(function):
    began = time.perf_counter()
    result = function()  # a search ends when its results are on the host
    return result, time.perf_counter() - began


def _split(index, queries: np.ndarray, k: int) -> dict:
    """Return the seconds of a pass spent on the product, on rounding, on selecting candidates and on settling them.

    Every step is synchronised, so that the sum exceeds the time of a normal pass. Nested steps are counted separately.
    """
    import torch

    from dynamicrag.search.candidates import Candidates
    from dynamicrag.search.exact import _Part

    # The steps of a pass
    wait = torch.cuda.synchronize if index._parts[0].device != "cpu" else lambda: None
    steps = {"rounding": (_Part, "_round"), "selection": (Candidates, "consider"), "sifting": (Candidates, "_sift"), "settling": (Candidates, "settle")}
    absent = [name for owner, name in steps.values() if not hasattr(owner, name)]
    if absent:
        raise Skipped(f"dynamicrag.search has no {', '.join(absent)}")
    # A clock that attributes the time to the innermost step
    seconds, calls, running, last = {"product": 0.0}, {}, ["product"], [time.perf_counter()]

    def turn() -> None:
        wait()
        now = time.perf_counter()
        seconds[running[-1]] = seconds.get(running[-1], 0.0) + now - last[0]
        last[0] = now

    def timed(label: str, method):
        def wrapped(*given):
            turn()
            running.append(label)
            calls[label] = calls.get(label, 0) + 1
            try:
                return method(*given)
            finally:
                turn()
                running.pop()
        return wrapped

    # One search with the steps timed
    with ExitStack() as stack:
        for label, (owner, name) in steps.items():
            stack.enter_context(patch.object(owner, name, timed(label, getattr(owner, name))))
        last[0] = time.perf_counter()
        index.search(queries, k)
        turn()
    return {**{f"{label}_s": round(value, 3) for label, value in seconds.items()}, "calls": calls}


def _rescored(index, questions: np.ndarray, size: int, expected) -> dict:
    """Return the seconds of a pass that compares `size` candidates per step, and check that the results are the same."""
    from dynamicrag.search import inner_products

    with patch.object(inner_products, "RESCORED", dict.fromkeys(inner_products.RESCORED, size)):
        result, seconds = _seconds(lambda: index.search(questions, 500))
    if expected is not None:
        assert (result[1] == expected[1]).all() and (result[0] == expected[0]).all(), "the results depend on RESCORED"
    return {"seconds": round(seconds, 3), "questions": len(questions), "k": 500}
