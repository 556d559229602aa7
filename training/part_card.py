"""README.md of a part that was trained alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

TEXT = """---
{data}
---

# {title}

{what}

Trained alone by `stereovla pretrain`: {summary}

```python
from transformers import AutoImageProcessor, AutoModel

folder = "."  # or an id on the Hub
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
{inputs}
{outputs}
```

`reference_prediction.safetensors` holds a prediction of the trained model and its pictures, so that any load can be
checked.

## Errors on held-out data

{errors}

## Training

Data: {datasets}. All options are in `training.json`.
"""


def part_card(
    title: str,
    what: str,
    task: tuple[str, Sequence[str]],
    inputs: str,
    outputs: str,
    summary: dict[str, Any],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str:
    """The text.

    Args:
        what: one sentence. task: pipeline tag and further tags. inputs, outputs: lines of Python.
        summary: as in training.json.
        head, rows: of the table of errors.
    """
    data = ModelCardData(library_name="transformers", pipeline_tag=task[0], tags=["robotics", *task[1]])
    lines = [head, ["---"] * len(head), *rows]
    return TEXT.format(
        data=data.to_yaml(),
        title=title,
        what=what,
        summary=summary["summary"],
        inputs=inputs,
        outputs=outputs,
        errors="\n".join(f"| {' | '.join(line)} |" for line in lines),
        # of folders their names alone: where they lie is nobody's business
        datasets=", ".join(Path(name).name if Path(name).exists() else name for name in summary["options"]["dataset"]),
    )
