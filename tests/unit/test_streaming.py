"""Working ahead of the consumer, and many at once: in order, bounded, and with errors at their turn."""

from concurrent.futures import Future
from threading import Event

import pytest

from blemish.streaming import grouped, map_ahead


def counted(items, pulled):
    for item in items:
        pulled.append(item)
        yield item


def free(item):
    return 0.0


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("most", [1, 3, 64])
def test_results_come_in_order(workers, most):
    results = list(map_ahead(lambda item: item**2, range(50), free, 1, workers, most))
    assert results == [item**2 for item in range(50)]


def test_order_holds_when_the_first_is_done_last():
    second_done = Event()

    def function(item):
        if item == 0:
            assert second_done.wait(60)
        if item == 1:
            second_done.set()
        return item

    assert list(map_ahead(function, range(5), free, 1, workers=2)) == list(range(5))


def test_nothing_in_nothing_out():
    assert list(map_ahead(abs, [], free, 1)) == []


@pytest.mark.parametrize("most", [1, 2, 5])
def test_at_most_so_many_items_are_under_way(most):
    pulled = []
    for number, _ in enumerate(map_ahead(abs, counted(range(30), pulled), free, 1, 2, most)):
        assert len(pulled) - number <= most + 1
    assert pulled == list(range(30))


def test_works_ahead_of_the_consumer():
    pulled = []
    results = map_ahead(abs, counted(range(30), pulled), free, 1, most=5)
    next(results)
    assert len(pulled) == 6
    results.close()


def test_costs_under_way_stay_within_the_budget():
    costs, pulled = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], []
    for number, _ in enumerate(map_ahead(abs, counted(costs, pulled), float, 10, workers=2)):
        # The last item that was looked at starts only once its cost fits.
        started = pulled[number + 1 : len(pulled) - (len(pulled) < len(costs))]
        assert sum(started) <= 10


def test_an_item_beyond_the_budget_goes_alone():
    pulled = []
    results = map_ahead(abs, counted([100, 100, 100], pulled), float, 10)
    for number in range(3):
        assert next(results) == 100
        assert len(pulled) == min(3, number + 2)
    assert list(results) == []


def test_exception_is_raised_at_its_turn():
    def function(item):
        if item == 3:
            raise ValueError("three")
        return item

    results = map_ahead(function, range(10), free, 1, workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


@pytest.fixture
def open_gate_after_cancelling(monkeypatch):
    """An event that is set once the second item has been cancelled."""
    gate, cancel, cancelled = Event(), Future.cancel, []

    def cancel_and_count(future):
        answer = cancel(future)
        cancelled.append(future)
        if len(cancelled) == 2:
            gate.set()
        return answer

    monkeypatch.setattr(Future, "cancel", cancel_and_count)
    return gate


@pytest.mark.parametrize("fails", [True, False], ids=["exception", "consumer stops"])
def test_what_has_not_started_is_dropped(fails, open_gate_after_cancelling):
    started = []

    def function(item):
        started.append(item)
        if item == 0 and fails:
            raise ValueError("zero")
        if item == 1:
            assert open_gate_after_cancelling.wait(60)
        return item

    results = map_ahead(function, range(10), free, 1, workers=1, most=3)
    if fails:
        with pytest.raises(ValueError, match="zero"):
            next(results)
    else:
        assert next(results) == 0
        results.close()
    assert started in ([0], [0, 1])


def test_neighbours_are_grouped_until_full():
    groups = grouped([3, 3, 3, 9, 1, 1, 5], lambda some, item: sum(some) + item > 6)
    assert list(groups) == [[3, 3], [3], [9], [1, 1], [5]]
    assert list(grouped([], lambda some, item: True)) == []


def test_a_group_is_given_away_before_the_next_one_is_gathered():
    pulled = []
    groups = grouped(counted(range(6), pulled), lambda some, item: len(some) == 2)
    assert next(groups) == [0, 1]
    assert pulled == [0, 1, 2]
