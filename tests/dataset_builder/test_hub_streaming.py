"""Streaming from the Hub gives the windows that the folder gives; failing reads are retried, then named."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_server import serve
from synthetic_dataset import write_dataset

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.manifest import count_splits, read_manifest
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream

# In a process of its own, since the address of the Hub is read when huggingface_hub is imported. One line per step: the
# server is told to fail in between.
SCRIPT = """
import json, sys
from stereovla.dataset_builder.dataset.shards import ShardError
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream
print(json.dumps(load_meta("someone/demonstrations")), flush=True)
for split in ("train", "test"):
    try:
        WindowStream("someone/damaged", split)
    except (ShardError, ValueError) as error:
        print(json.dumps(str(error)), flush=True)
options = dict(epochs=1, lanes=3, pool_episodes=2, retries=3, backoff_s=0.01)
stream = WindowStream("someone/demonstrations", **options)
for line in sys.stdin:
    try:
        windows = [[w["episode_index"], w["frame_index"], w["objective"]] for w in stream]
    except ShardError as error:
        windows = str(error)
    print(json.dumps(windows), flush=True)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("hub") / "dataset", [3, 4, 5, 3, 6], 2)
    splits = count_splits(read_manifest(folder))
    shards.write_json(folder / "meta/info.json", {"fps": 10, "tasks": ["pick up the red cube"], "splits": splits})
    shards.write_json(folder / "meta/stats.json", {"franka_panda": {}})
    return folder


def test_hub_gives_the_windows_of_the_folder_and_failures_are_retried(dataset, tmp_path):
    expected = [
        [window["episode_index"], window["frame_index"], window["objective"]]
        for window in WindowStream(dataset, epochs=1, lanes=3, pool_episodes=2)
    ]
    shard = shards.shard_path("train", 1, 3).as_posix()
    failing = {shard: 0}

    def fault(number, method, path):
        if method == "GET" and path.endswith(shard) and failing[shard] > 0:
            failing[shard] -= 1
            return 403  # a status that clients do not retry on their own

    damaged = shutil.copytree(dataset, tmp_path / "damaged")
    (damaged / shards.shard_path("train", 2, 3)).unlink()
    content = bytearray((damaged / shard).read_bytes())
    content[1000] ^= 1
    (damaged / shard).write_bytes(content)
    with serve() as server:
        server.add("dataset", "someone/demonstrations", dataset)
        server.add("dataset", "someone/damaged", damaged)
        server.fault = fault
        hub = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment = os.environ | hub | {"HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", SCRIPT]
        with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, stderr=-3, text=True) as process:

            def step():
                process.stdin.write("go\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            assert json.loads(process.stdout.readline()) == load_meta(dataset)
            refused = json.loads(process.stdout.readline())
            assert "2 of 3 shards of dataset someone/damaged, split 'train', are not those of its manifest" in refused
            assert f"{shard}: its SHA-256 differs" in refused and "train-00002-of-00003.parquet: missing" in refused
            assert "has no split 'test'; it has: train" in json.loads(process.stdout.readline())
            assert step() == expected
            failing[shard] = 2
            assert step() == expected
            assert failing[shard] == 0
            failing[shard] = 10**6
            message = step()
            process.stdin.close()
    assert shard in message and "unreachable, truncated or corrupt" in message and "4 tries" in message
