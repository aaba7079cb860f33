"""Tests of the threads of a process."""

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from qk_sniffer.machine import workers


def blas_threads() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def test_workers_have_one_thread_of_blas_each_and_leave_the_others_as_they_were() -> None:
    with threadpool_limits(2, "blas"):
        np.eye(2) @ np.eye(2)
        before = blas_threads()
        assert set(before) == {2}
        with workers(3) as pool:
            assert set(pool.submit(blas_threads).result()) == {1}
        assert blas_threads() == before
