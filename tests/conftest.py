"""Settings of all tests."""

import os
import tempfile

import pytest
from fresh_process import forks, offline
from hypothesis import HealthCheck, settings

# a busy machine is no fault of a test
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# what starts processes and takes longest begins first, so that in the end no worker waits long for another
FIRST = ("training", "sharing", "dataset_builder")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: a worker waits a fifth of its time for processes that it started."""
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list) -> None:
    """Files of the rooms in `FIRST` before all others; the order within a file stays."""
    items.sort(key=lambda item: FIRST.index(item.path.parent.name) if item.path.parent.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True, scope="session")
def _cache():
    """What is verified of datasets in temporary folders is not kept in the user's cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STEREOVLA_CACHE"] = folder
        yield


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Runs programs in processes that know nothing of this project, without a Hub; see `fresh_process.Client.run`."""
    folder = tmp_path_factory.mktemp("fresh")
    with forks(folder, offline(folder / "home")) as found:
        yield found


@pytest.fixture(scope="session")
def trained_policy(tmp_path_factory):
    """Folder of a policy that picks things up, which takes minutes to train; see `trained_policy`."""
    from trained_policy import train_policy

    return train_policy(tmp_path_factory.mktemp("trained"))
