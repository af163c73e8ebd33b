"""Rows with rewarded trajectories."""

from hypothesis import strategies as st


def make_row(trajectories: list[tuple[list[int], str, float, float]], number: int = 1, docs_shown: int = 5, **more) -> dict:
    """A row with trajectories (identifiers, response, reward, em)."""
    docs = [{"id": f"d{n}", "title": f"title {n}", "text": f"text {n}", "score": 0.5} for n in range(1, 8)]
    ids, responses, scores, ems = map(list, zip(*trajectories, strict=True)) if trajectories else ([], [], [], [])
    return {
        "id": f"q{number}", "question": f"what is {number}?", "answers": [f"gold {number}"], "docs": docs, "docs_shown": docs_shown,
        "id_lists": ids, "responses": responses, "response_scores": scores, "score_terms": [{"em": em} for em in ems], **more,
    }


RIGHT = ([1], "gold 1", 0.9, 1.0)
WRONG = ([2, 3], "bad", 0.3, 0.0)
WORSE = ([4], "worse", 0.1, 0.0)

trajectory = st.tuples(
    st.lists(st.integers(1, 5), max_size=4, unique=True), st.sampled_from(["gold 1", "a", "b", " a", "", "c d"]),
    st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 0.5, 0.9]),
)
