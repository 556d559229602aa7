"""What must not be published: secrets, and paths of the machine that a folder was made on."""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

# what it is: (bytes that a case begins with, the whole from there on). Random bytes of weights do not match: 16 of them
# that all happen to be letters or digits come once in 10^13 places.
RULES = {
    "a Hugging Face token": ((b"hf_", b"api_org_"), rb"\b(hf_|api_org_)[A-Za-z0-9]{30,}"),
    "an AWS access key": ((b"AKIA", b"ASIA"), rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "an AWS secret key": ((b"aws_secret", b"AWS_SECRET"), rb"(?i)aws_secret\w*\W{1,5}[A-Za-z0-9/+]{40}"),
    "a private key": ((b"-----BEGIN ",), rb"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a GitHub token": ((b"ghp_", b"gho_", b"ghs_", b"ghu_", b"ghr_", b"github_pat_"), rb"\b(gh|github_pat)\w{33,}"),
    "an API key": ((b"sk-", b"AIza", b"xox"), rb"\b(sk-[\w-]{32,}|AIza[\w-]{35}|xox[abpr]-[\w-]{20,})"),
    "a home folder": (
        (b"/home/", b"/Users/", b"/root/", b":\\Users\\", b":\\\\Users\\\\"),
        rb"((?<![\w.~/-])/(home|Users|root)/|:\\{1,2}Users\\{1,2})[\w.-]{2,}",
    ),
}
# a quoted absolute path, which is a leak where it exists on this machine
PATH = re.compile(r"""["'](/[\w.-]+/[^"'\n]{1,300})["']""")


def find_leaks(folder: Path) -> list[str]:
    """One line per leak in the files of a folder, "file, line n: what it is"; the secret itself is not repeated.

    All files are read whole, weights and shards too, whose metadata may hold such texts: 15 s per GB.
    """
    leaks = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        leaks += [f"{name}, line {line}: {what}" for line, what in _leaks(path)]
    return leaks


def _leaks(path: Path) -> Iterator[tuple[int, str]]:
    if not path.stat().st_size:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for what, (starts, whole) in RULES.items():
            rule = re.compile(whole)
            for start in starts:  # looking for plain bytes first is 7 times as fast as looking for the whole
                place = content.find(start)
                while place >= 0:
                    if rule.match(content, place):
                        yield content[:place].count(b"\n") + 1, what
                    place = content.find(start, place + 1)
        if content.find(b"\0") < 0:
            text = content[:].decode("utf-8", errors="replace")
            for found in PATH.finditer(text):
                if Path(found[1]).exists():
                    yield text.count("\n", 0, found.start()) + 1, f"a path of this machine, {found[1]}"
