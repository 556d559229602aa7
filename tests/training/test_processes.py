"""How many threads a training process takes."""

import os
import platform
import subprocess
import sys

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


FAULTS = """
import resource, torch
from stereovla.training.processes import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for keep in (False, True):
    keep_freed_memory(keep)
    pages()
    print(pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step():
    """Pages that the operating system gives out anew are counted by it."""
    told = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout
    handed_back, kept = map(int, told.split())
    assert handed_back >= 20 and kept * 4 < handed_back
