"""The plugin's tests run where LeRobot is installed beside stereovla (see the README)."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("lerobot") else ["test_*.py"]
