"""dataset_builder.dataset.card_edits: what a person wrote survives, wherever it was written."""

import pytest
from huggingface_hub import ModelCard

from stereovla.dataset_builder.dataset.card_edits import END, START, update_card

DATA = {"license": "mit", "tags": ["stereo"]}


def published(path, text: str) -> str:
    """The card as it is on the Hub after somebody added a text below."""
    return path.read_text() + text


def test_text_and_metadata_around_stay(tmp_path):
    path = update_card(tmp_path / "README.md", DATA, "# One")
    card = ModelCard.load(path)
    card.text = f"Above.\n{card.text}\nBelow.\n"
    card.data["thumbnail"], card.data["tags"] = "a.png", ["mine", "stereo"]
    card.save(path)
    for _ in range(2):  # and nothing grows
        update_card(path, DATA | {"license": "apache-2.0"}, "# Two")
    text = ModelCard.load(path).text
    assert text.strip() == f"Above.\n\n{START}\n# Two\n{END}\n\nBelow."
    assert ModelCard.load(path).data.to_dict() == {
        "license": "apache-2.0",
        "tags": ["stereo", "mine"],
        "thumbnail": "a.png",
    }


def test_edits_on_the_hub_come_into_a_fresh_folder(tmp_path):
    hub = update_card(tmp_path / "hub.md", DATA, "# Old")
    path = update_card(tmp_path / "README.md", DATA, "# New", published(hub, "\nA remark.\n"))
    assert "# New" in path.read_text() and "# Old" not in path.read_text() and "A remark." in path.read_text()


def test_the_longer_text_wins_and_a_conflict_is_told(tmp_path):
    path = update_card(tmp_path / "README.md", DATA, "# One")
    here, there = published(path, "\nA\nB\n"), published(path, "\nA\n")
    path.write_text(here)
    assert path.read_text() != update_card(path, DATA, "# Two", there).read_text()
    assert "A\nB" in path.read_text()
    path.write_text(there)
    assert "A\nB" in update_card(path, DATA, "# Three", here).read_text()
    path.write_text(there.replace("\nA\n", "\nC\n"))
    with pytest.raises(ValueError, match="edited in .*README.md and on the Hub: .* 'C'"):
        update_card(path, DATA, "# Four", here)


def test_results_of_other_weights_go_and_the_form_of_peft_too(tmp_path):
    path = tmp_path / "README.md"
    update_card(path, DATA | {"base_model": "x/y"}, "# One")
    assert update_card(path, DATA, "# Two").read_text().count("x/y") == 0
    path.write_text("---\nbase_model: /a/b\n---\n\n# Model Card for Model ID\n\n[More Information Needed]\n")
    text = update_card(path, DATA, "# Mine").read_text()
    assert "More Information" not in text and "/a/b" not in text
