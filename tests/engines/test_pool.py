import threading
import time

import pytest

from tnm_pipeline.engines import DeadlineExceeded, Overloaded
from tnm_pipeline.engines.pool import Pool


def test_what_is_lent_comes_back_also_after_an_error() -> None:
    pool = Pool(["a"], patience=0.01)
    with pytest.raises(KeyError), pool.lent():
        raise KeyError
    with pool.lent() as item:
        assert item == "a"


def test_the_last_one_back_is_lent_first() -> None:
    pool = Pool(["a", "b", "c"], patience=1)
    first, second = pool.take(), pool.take()
    pool.give_back(first)
    assert pool.take() == first
    pool.give_back(second)
    assert pool.take() == second


def test_nothing_is_lent_twice_at_a_time() -> None:
    pool = Pool([0, 1, 2], patience=10)
    users, most, lock = [0, 0, 0], [0], threading.Lock()

    def borrow() -> None:
        for _ in range(50):
            with pool.lent() as item:
                with lock:
                    users[item] += 1
                    most[0] = max(most[0], *users)
                time.sleep(0.0002)
                with lock:
                    users[item] -= 1

    threads = [threading.Thread(target=borrow) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert users == [0, 0, 0]


def test_who_waits_in_vain_learns_which_bound_it_was() -> None:
    pool = Pool([0], patience=0.02)
    with pool.lent():
        with pytest.raises(Overloaded, match=r"all 1 contexts were busy for 0\.02 s: load with a larger pool"):
            pool.take()
        with pytest.raises(DeadlineExceeded, match="busy until the deadline"):
            pool.take(time.monotonic() + 0.005)
        with pytest.raises(DeadlineExceeded):
            pool.take(time.monotonic() - 1)
        with pytest.raises(Overloaded):
            pool.take(time.monotonic() + 60)
    assert pool.take(time.monotonic() - 1) == 0  # what is free is not waited for


@pytest.mark.parametrize(("items", "patience"), [([], 1.0), ([0], 0.0), ([0], float("nan"))])
def test_a_pool_of_nothing_is_refused(items: list[int], patience: float) -> None:
    with pytest.raises(ValueError, match="give one or more and a time"):
        Pool(items, patience)


def test_who_waits_is_served_in_order_before_who_comes_back() -> None:
    """One thread that gives back and takes again at once must not starve the others."""
    pool = Pool([0], patience=60)
    served: list[str] = []
    item = pool.take()

    def wait(name: str) -> None:
        with pool.lent():
            served.append(name)

    threads = []
    for name in "abc":
        thread = threading.Thread(target=wait, args=(name,))
        thread.start()
        threads.append(thread)
        while len(pool._waiters) < len(threads):
            time.sleep(0.0005)
    pool.give_back(item)
    with pool.lent():
        served.append("again")
    for thread in threads:
        thread.join()
    assert served == ["a", "b", "c", "again"]


def test_who_gave_up_is_handed_nothing() -> None:
    pool = Pool([0], patience=0.01)
    item = pool.take()
    with pytest.raises(Overloaded):
        pool.take()
    pool.give_back(item)
    assert pool.take() == 0
