"""Cards that are written anew without losing what a person added around the generated part, here or on the Hub."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.repocard import RepoCard

START = "<!-- stereovla: generated; edit above and below, this part is written anew -->"
END = "<!-- stereovla: end of the generated part -->"
# metadata that is ours alone: without it in `data`, what is there is of other weights
_OURS = ("model-index", "datasets", "base_model", "base_model_relation")
_PEFT_TEMPLATE = "# Model Card for Model ID"  # what PEFT puts into every adapter's folder, all of it to be filled in


def update_card(
    path: Path, data: dict[str, Any], body: str, published: str | None = None, kind: type[RepoCard] = ModelCard
) -> Path:
    """Writes the card at `path`: metadata `data` over what is there (tags are joined), and `body` between the marks.
    The text around them is kept.

    Args:
        published: the card on the Hub, which may have been edited there. ValueError where both texts have lines that
            the other lacks: nobody but a person can join them.
    """
    cards = [kind(text) for text in (path.read_text(encoding="utf-8") if path.exists() else None, published) if text]
    cards = [card for card in cards if not card.text.strip().startswith(_PEFT_TEMPLATE)]
    around = max((_around(card.text) for card in cards), key=lambda parts: len(_lines(parts)), default=("", ""))
    for card in cards:
        if missing := _lines(_around(card.text)) - _lines(around):
            raise ValueError(
                f"the card was edited in {path} and on the Hub: of the longer text is missing {sorted(missing)[0]!r}. "
                f"Put all you want to keep into the Hub's card and delete {path}, or the other way round"
            )
    merged: dict[str, Any] = {}
    for card in cards:
        merged |= {key: value for key, value in card.data.to_dict().items() if key not in _OURS}
    tags = [*data.get("tags", []), *(tag for card in cards for tag in card.data.to_dict().get("tags") or [])]
    merged |= data | {"tags": list(dict.fromkeys(tags))}
    text = "\n\n".join(part for part in (around[0], f"{START}\n{body.strip()}\n{END}", around[1]) if part)
    card = kind("---\nlicense: other\n---\n")
    card.data, card.text = kind.card_data_class(**merged), f"\n{text}\n"
    temporary = path.with_name(f".{path.name}.tmp")
    card.save(temporary)
    os.replace(temporary, path)
    return path


def _around(text: str) -> tuple[str, str]:
    before, found, rest = text.partition(START)
    return before.strip(), rest.partition(END)[2].strip() if found else ""


def _lines(around: tuple[str, str]) -> set[str]:
    return {line.strip() for part in around for line in part.splitlines() if line.strip()}
