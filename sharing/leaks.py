"""What must not be published: secrets, and paths of the machine that a folder was made on.

Secrets are looked for by the rules of Kingfisher (https://github.com/mongodb/kingfisher), which MongoDB maintains, and
by a few more below, for what has no form of its own but where it stands.
"""

import mmap
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from stereovla.extras import extra
from stereovla.sharing.contents import OVERLAP, SLICE, hidden_texts, reason_not_searched

with extra("share"):
    from kingfisher_sdk import Rules, Scanner

# what it is: (bytes that a case begins with, the whole from there on). Random bytes of weights do not match: 16 of them
# that all happen to be letters or digits come once in 10^13 places.
RULES = {
    "a Hugging Face token": ((b"hf_", b"api_org_"), rb"\b(hf_|api_org_)[A-Za-z0-9]{30,}"),
    "an AWS access key": ((b"AKIA", b"ASIA"), rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "an AWS secret key": ((b"aws_secret", b"AWS_SECRET"), rb"(?i)aws_secret\w*\W{1,5}[A-Za-z0-9/+]{40}"),
    "a private key": ((b"-----BEGIN ",), rb"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a GitHub token": ((b"ghp_", b"gho_", b"ghs_", b"ghu_", b"ghr_", b"github_pat_"), rb"\b(gh|github_pat)\w{33,}"),
    "an API key": (
        (b"sk-", b"AIza", b"xox"),
        rb"\b(sk-(?=[\w-]*\d)[\w-]{32,}|AIza[\w-]{35}|xox[abpr]-[\w-]{20,})",
    ),
    "a Telegram token": ((b":AA",), rb"(?<=\d{8}):AA[\w-]{32,33}\b"),
    "an Azure key": ((b"AccountKey=",), rb"AccountKey=[A-Za-z0-9+/]{86}=="),
    "a Notion token": ((b"secret_",), rb"\bsecret_(?=\w*\d)[A-Za-z0-9]{43}\b"),
    "a Discord webhook": ((b"api/webhooks/",), rb"api/webhooks/\d{16,20}/[\w-]{60,}"),
}
# of texts only, where the value is the last group
TEXT_RULES = {
    "a password in an address": rb"[a-z][a-z0-9+.-]{2,20}://[^\s/:@\"'<>{}]{1,64}:([^\s/:@\"'<>{}$]{6,100})@",
    "a bearer token": rb"(?i)\bbearer\s+([\w.~+/-]{20,}=*)",
    "a Discord token": rb"\b([MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,38})\b",
    "a Mailchimp key": rb"\b([0-9a-f]{32}-us\d{1,2})\b",
    "a Kaggle key": rb"(?i)\"key\"\s*:\s*\"([0-9a-f]{32})\"",
    "a login": rb"(?i)\blogin\s+\S+\s+password\s+(\S{8,})",
    "a value that is named a secret": (
        rb"(?i)(?:password|passwd|pwd|secret|token|api_?key|access_?key|auth_?key|secret_?key|account_?key|credentials?)"
        rb"[\"']?\s{0,3}(?:=|:|=>)\s{0,3}[\"']?([A-Za-z0-9+/=_-]{16,200})(?![\w.(\[])"
    ),
}
# what stands for a secret in examples
_PLACEHOLDER = re.compile(rb"(?i)example|placeholder|your|xxxx|\.\.\.|password|changeme|secret$|\*\*\*|dummy|redacted")
_GENERIC_URI = "betterleaks.generic-credential-uri"  # also finds user:password@localhost; see TEXT_RULES
# and whether something in it is named
HOME = re.compile(rb"((?<![\w.~/-])/(home|Users|root)/|:\\{1,2}Users\\{1,2})[\w.-]{2,}([/\\])?")
NOBODY = re.compile(rb"(?i)[/\\](user|username|you|me|your[\w-]*|name)[/\\]?$")  # whose home folder stands in examples
# a quoted absolute path, which is a leak where it exists on this machine; what every machine has is none
PATH = re.compile(r"""["'](/[\w.-]+/[^"'\n]{1,300})["']""")
EVERYWHERE = re.compile(r"/(bin|boot|dev|etc|lib\w*|proc|run|sbin|sys|usr|var/(lib|log|run|tmp))(/|$)")


@cache
def scanner() -> Scanner:
    """Kingfisher with its own rules; compiling them takes seconds, then they are in its cache."""
    return Scanner(Rules())


def find_leaks(folder: Path) -> list[str]:
    """One line per leak in the files of a folder, "file, line n: what it is"; the secret itself is not repeated.

    All files are read whole, weights and shards too, and what is compressed or encoded in them; what cannot be looked
    into is named as well.
    """
    leaks = []
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file()), 1):
        name = path.relative_to(folder).as_posix()
        if in_name := _in_text(name.encode()):
            name = f"file number {number} in the order of names"
            leaks += [f"the name of {name}: {what}" for _, what in in_name]
        if not path.stat().st_size:
            continue
        if reason := reason_not_searched(path):
            leaks.append(f"{name}: {reason}, whose content cannot be searched; unpack it, or leave it out")
            continue
        found = list(_in_file(path))
        leaks += [f"{name}, line {line + 1}: {what}" for line, what in found]
        known = {what for _, what in found}
        try:
            for text in hidden_texts(path):
                for _, what in _in_text(text):
                    if what not in known:
                        known.add(what)
                        leaks.append(f"{name}, packed or encoded in it: {what}")
        except ValueError as error:
            leaks.append(f"{name}: {error}")
    return leaks


def _in_file(path: Path) -> Iterator[tuple[int, str]]:
    """(line from 0, what it is) in the bytes of a file as they are."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"\0") < 0:
            yield from _in_text(content[:])
            return
        places = list(_by_start(content))
        yield from ((content[:place].count(b"\n"), what) for place, what in places)
        known, before = {content[:place].count(b"\n") for place, _ in places}, 0
        for start in range(0, len(content), SLICE - OVERLAP):
            part = content[start : start + SLICE]
            yield from _by_kingfisher(part, known, before)
            before += part.count(b"\n", 0, SLICE - OVERLAP)


def _in_text(content: bytes) -> list[tuple[int, str]]:
    """(line from 0, what it is) in a text, by all rules; of a line with a token of a known form only that is named."""
    found = {(content.count(b"\n", 0, place), what) for place, what in _by_start(content)}
    lines = {line for line, _ in found}
    for place, what in _by_rule(content):
        if (line := content.count(b"\n", 0, place)) not in lines:
            found.add((line, what))
    found |= {(content.count(b"\n", 0, place), what) for place, what in _paths(content)}
    return sorted([*found, *_by_kingfisher(content, {line for line, _ in found})])


def _by_start(content: bytes | mmap.mmap) -> Iterator[tuple[int, str]]:
    """(place, what it is) by `RULES` and home folders."""
    for what, (starts, whole) in RULES.items():
        rule = re.compile(whole)
        for start in starts:  # looking for plain bytes first is 7 times as fast as looking for the whole
            place = content.find(start)
            while place >= 0:
                if (found := rule.match(content, place)) and (what == "a private key" or is_random(found[0])):
                    yield place, what
                place = content.find(start, place + 1)
    for start in (b"/home/", b"/Users/", b"/root/", b":\\Users\\", b":\\\\Users\\\\"):
        place = content.find(start)
        while place >= 0:
            if (found := HOME.match(content, place)) and is_home(found):
                yield place, "a home folder"
            place = content.find(start, place + 1)


def is_home(found: re.Match) -> bool:
    """Whether a match of `HOME` is the folder of a person; a route of a web page may be called /home/page."""
    if NOBODY.search(found[0]):
        return False
    return bool(found[3]) or found[0].startswith(b"/root/") or Path(found[0].decode(errors="replace")).exists()


def _by_rule(content: bytes) -> Iterator[tuple[int, str]]:
    for what, rule in TEXT_RULES.items():
        for found in re.finditer(rule, content):
            value = found[1]
            if is_random(value) and (what == "a password in an address" or len(re.findall(rb"\d", value)) >= 2):
                yield found.start(), what


def is_random(value: bytes) -> bool:
    """Whether a value can be a secret rather than what stands for one in an example."""
    return len(set(value)) >= 6 and not _PLACEHOLDER.search(value)


def _paths(content: bytes) -> Iterator[tuple[int, str]]:
    for found in PATH.finditer(content.decode("latin-1")):  # a place for each byte
        path = found[1].encode("latin-1").decode("utf-8", "replace")
        if not EVERYWHERE.match(path) and Path(path).exists():
            yield found.start(), f"a path of this machine, {path}"


def _by_kingfisher(content: bytes, known: set[int], before: int = 0) -> Iterator[tuple[int, str]]:
    """(line from 0, what it is), of lines that are not known yet; `before` lines precede what is searched.

    Zeros are searched as spaces, and a space comes first: where they are many, and where UTF-16's mark stands at the
    start, Kingfisher takes the bytes for UTF-16, and misses what is not.
    """
    for finding in scanner().scan(b" " + content.replace(b"\0", b" ")):
        line = before + finding.location["line"] - 1
        if finding.visible and line not in known and finding.rule_id != _GENERIC_URI:
            known.add(line)
            yield line, f"a secret, by the rule {finding.rule_id}"
