"""Batches: padding, and work prepared in a thread while other work goes on."""

import threading
import time

import pytest

from dynamicrag.models.batches import pad
from dynamicrag.rows.ahead import prepared_ahead


@pytest.mark.parametrize("sequences", [[[5, 6, 7], [8]], [[1]], [[], [2, 2]], [[], []]])
def test_padding_is_on_the_right_and_masked(sequences):
    ids, mask = pad(sequences, 9, "cpu")
    longest = max(map(len, sequences))
    assert ids.tolist() == [sequence + [9] * (longest - len(sequence)) for sequence in sequences]
    assert mask.tolist() == [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]


@pytest.mark.parametrize("sequences", [[[5, 6, 7], [8]], [[1]], [[], [2, 2]], [[], []]])
def test_padding_on_the_left(sequences):
    ids, mask = pad(sequences, 9, "cpu", left=True)
    longest = max(map(len, sequences))
    assert ids.tolist() == [[9] * (longest - len(sequence)) + sequence for sequence in sequences]
    assert mask.tolist() == [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]


def test_the_next_item_is_prepared_while_the_caller_works():
    begun = [threading.Event() for _ in range(4)]

    def prepare(item):
        begun[item].set()
        return item * 10

    for item, prepared in enumerate(prepared_ahead(prepare, range(4))):
        assert prepared == item * 10
        assert item == 3 or begun[item + 1].wait(5), "the next one is prepared meanwhile"
        time.sleep(0.01)
        assert not any(event.is_set() for event in begun[item + 2 :]), "and no more than that one"


def test_an_error_in_preparing_is_raised_in_its_turn():
    def prepare(item):
        return 1 // item

    results = prepared_ahead(prepare, [1, 0])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(prepared_ahead(prepare, [])) == []
