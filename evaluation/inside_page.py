"""The page of a look inside a policy: every picture that there is, with what is seen on it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stereovla.extras import extra

with extra("report"):
    from jinja2 import Environment

# picture: title, and what is seen on it
SECTIONS = {
    "attention.png": (
        "Where the actions look",
        "Shares of the action tokens' attention on each stream, by layer of the action expert: means over heads, "
        "tokens and denoising steps.",
    ),
    "features.png": (
        "What is seen",
        "Features pooled to the visual tokens, in the colours of their three main components over all frames: what has "
        "one colour is alike to the policy. Then the left view, dark but where the actions' attention lies (a mean "
        "over layers and denoising steps), and where the pointers look.",
    ),
    "geometry.png": (
        "How far away things are",
        "What the stereo encoder or the depth expert says, beside the truth. Errors are drawn up to 3 px, or 20 %.",
    ),
    "answers.png": (
        "What it says",
        "Green: the truth, box and keyframe. Red: the box that it answers, and as a diamond the keyframe that the "
        "pointers tell the action expert. Violet square: the keyframe that it answers in words. Yellow: the chunk of "
        "actions. Underneath, the depths that it answers. What training never asked for means nothing.",
    ),
    "strip.png": (
        "The keyframe through an episode",
        "Green: the true one. Red diamond: the one that the pointers tell. It jumps where the data names another "
        "target.",
    ),
    "keyframe.png": ("", "The same by coordinate, and its error."),
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Inside {{ name }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #22303c; background: #fafaf8 }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
img { max-width: 100%; display: block; margin: .8rem 0; background: white }
p.note { color: #6b7883 }
table { border-collapse: collapse } th, td { text-align: left; padding: .25rem .8rem; border-bottom: 1px solid #e1e6ea }
</style>
<h1>Inside {{ name }}</h1>
<p class="note">{{ about }}</p>
{% if numbers %}
<table>
{% for row, value in numbers.items() %}
<tr><th>{{ row }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% for picture, (title, text) in sections.items() %}
{% if title %}
<h2>{{ title }}</h2>
{% endif %}
<p>{{ text }}</p>
<img src="{{ picture }}" alt="{{ title or text }}">
{% endfor %}
</html>
"""


def write_page(out: Path, name: str, about: str, numbers: Mapping[str, Any]) -> Path:
    """Writes inside.html into the folder of the pictures; those that are not there are left out."""
    sections = {picture: words for picture, words in SECTIONS.items() if (out / picture).is_file()}
    page = Environment(autoescape=True).from_string(PAGE)
    path, temporary = out / "inside.html", out / "inside.html.tmp"
    temporary.write_text(page.render(name=name, about=about, numbers=numbers, sections=sections), encoding="utf-8")
    os.replace(temporary, path)
    return path
