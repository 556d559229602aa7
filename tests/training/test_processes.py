"""How many threads a training process takes."""

import os

import pytest
import torch

from stereovla.training import processes


@pytest.fixture
def restored():
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux alone")
def test_a_process_takes_as_many_threads_as_it_has_cores(restored, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes.share_cores() == torch.get_num_threads() == len(cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * len(cores)))
    assert processes.share_cores() == 1  # more processes than cores
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    torch.set_num_threads(3)
    os.sched_setaffinity(0, {cores[0]})
    assert processes.share_cores() == torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert processes.share_cores() == 3  # as it was told


def test_a_busy_machine_is_told(monkeypatch, recwarn):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 0.0, 0.0))
    processes.warn_of_load(2)
    processes.warn_of_load(1)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"the load of this machine is 2.5 on 4 cores: with 4 threads"):
        processes.warn_of_load(4)
