"""docs/serving.md: its program, against a server of an adapter's folder as well as of a whole model."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from serving_thread import policy_server, serve_in_thread
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint
from transformers import AutoModel, AutoProcessor

from stereovla.sources import InputError
from stereovla.sources import load_checkpoint as load

ROOT = Path(__file__).parents[2]
ADDRESS = "ws://127.0.0.1:8765"


def save_adapter(folder: Path, base: Path) -> Path:
    model = AutoModel.from_pretrained(base, trust_remote_code=True)
    get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*language_model\.layers\.0\.self_attn\.q_proj")
    ).save_pretrained(folder)
    AutoProcessor.from_pretrained(base, trust_remote_code=True).save_pretrained(folder)
    return folder


def test_the_pages_program_runs(tmp_path, monkeypatch, capsys):
    program, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), flags=re.DOTALL)
    assert ADDRESS in program
    monkeypatch.chdir(ROOT)
    whole = save_tiny_checkpoint(tmp_path / "whole")
    for folder in (whole, save_adapter(tmp_path / "adapter", whole)):
        url, stop = serve_in_thread(policy_server(load(str(folder), "cpu"), folder.name))
        try:
            exec(compile(program.replace(ADDRESS, url), "docs/serving.md", "exec"), {})
        finally:
            stop()
        greeting, answer = capsys.readouterr().out.splitlines()[-2:]
        assert greeting == f"{folder.name} {[EMBODIMENT]} 8"
        assert re.fullmatch(r"\(8, 7\) [\d.]+", answer)


def test_a_folder_that_is_neither_is_named(tmp_path):
    for name, lacks in (("notes.txt", "config.json"), ("adapter_config.json", "adapter_model.safetensors")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(InputError, match=f"lacks {lacks}"):
            load(str(folder), "cpu")
