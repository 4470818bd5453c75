"""Names and semantic versions: what is allowed, and how versions are ordered.

adapter    namespace/name       a bare name lives in the namespace `default`
version    MAJOR.MINOR.PATCH[-PRERELEASE]      semver.org 2.0.0 without build metadata ('+' joins recipes)
"""

from __future__ import annotations

import re
from pathlib import Path

from composer.errors import UsageError

__all__ = [
    "DEFAULT_NAMESPACE",
    "Version",
    "adapter_name",
    "alias_name",
    "base_name",
    "slug",
    "subject_name",
    "valid_name",
]

DEFAULT_NAMESPACE = "default"
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,198}[A-Za-z0-9]|[A-Za-z0-9]")
SEMVER = re.compile(
    r"(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})"
    r"(?:-((?:0|[1-9]\d{0,9}|\d*[A-Za-z-][0-9A-Za-z-]*)(?:\.(?:0|[1-9]\d{0,9}|\d*[A-Za-z-][0-9A-Za-z-]*))*))?"
)


def valid_name(part: str) -> bool:
    """Whether `part` may be a namespace, an adapter, a base or an alias."""
    return bool(NAME.fullmatch(part)) and ".." not in part


def adapter_name(text: str) -> tuple[str, str]:
    """(namespace, name). Raises UsageError."""
    namespace, slash, name = text.rpartition("/")
    parts = (namespace if slash else DEFAULT_NAMESPACE, name)
    if not all(map(valid_name, parts)):
        raise UsageError(
            f"{text!r} is not an adapter name",
            expected="NAMESPACE/NAME of letters, digits, '.', '_' and '-', at most 96 each, such as team/shout",
            found=text,
            remedy="choose another name; a folder is written with './' in front",
        )
    return parts


def subject_name(text: str) -> str:
    """Who a token stands for: a person, or a workload such as repo:acme/train. Raises UsageError."""
    if not SUBJECT.fullmatch(text):
        raise UsageError(
            f"{text!r} is not a name for a subject",
            expected="1 to 200 letters, digits and . _ : / @ -, such as alice or repo:acme/train",
            found=text,
            remedy="choose another name",
        )
    return text


def base_name(text: str) -> str:
    """A base's name, with or without a namespace. Raises UsageError."""
    parts = text.split("/")
    if len(parts) > 2 or not all(map(valid_name, parts)):
        raise UsageError(
            f"{text!r} is not a name for a base",
            expected="[NAMESPACE/]NAME of letters, digits, '.', '_' and '-', at most 96 each, such as smollm2",
            found=text,
            remedy="choose a name with --name",
        )
    return text


def alias_name(text: str) -> str:
    """A movable name such as `prod`. Raises UsageError for `latest`, versions and digests."""
    if not valid_name(text) or text == "latest" or Version.matches(text):
        raise UsageError(
            f"{text!r} is not a name for an alias",
            expected="letters, digits, '.', '_' and '-'; neither a version nor 'latest', which moves by itself",
            found=text,
            remedy="choose a name such as prod",
        )
    return text


def slug(folder: Path) -> str:
    """A name for a base made from its folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+|\.\.+", "-", folder.resolve().name).strip("._-")[:96]


class Version:
    """A semantic version and its order."""

    def __init__(self, text: str) -> None:
        match = SEMVER.fullmatch(text)
        if match is None or len(text) > 100:
            raise UsageError(
                f"{text!r} is not a semantic version",
                expected="MAJOR.MINOR.PATCH[-PRERELEASE], such as 1.2.0 or 2.0.0-rc.1",
                found=text,
                remedy="see semver.org; build metadata ('+…') is not used here",
            )
        self.text = text
        self.numbers = tuple(int(match[index]) for index in (1, 2, 3))
        self.pre = match[4]

    @staticmethod
    def matches(text: str) -> bool:
        """Whether `text` is a semantic version."""
        return SEMVER.fullmatch(text) is not None

    @property
    def sort_key(self) -> str:
        """Text whose order by bytes is the order of semver.org §11."""
        release = ".".join(f"{number:010d}" for number in self.numbers)
        if not self.pre:
            return f"{release}~"
        parts = (f"0{int(part):010d}" if part.isdigit() else f"1{part}" for part in self.pre.split("."))
        return f"{release}-{'!'.join(parts)}"

    def next_patch(self) -> str:
        """The version that a publish without --version gets after this one."""
        major, minor, patch = self.numbers
        return f"{major}.{minor}.{patch}" if self.pre else f"{major}.{minor}.{patch + 1}"
