"""What is refused because it crosses the network: local paths, and file names that could leave their folder.

The client applies the same rules before it sends, and to what a service sends back.
"""

from __future__ import annotations

from composer.errors import PolicyError, UsageError
from composer.recipe import Recipe, is_path

__all__ = ["MAX_FILES", "UploadTooLargeError", "check_file_name", "refuse_path", "refuse_paths"]

MAX_FILES = 1000
MAX_NAME = 512
MAX_PART = 255
FORBIDDEN = frozenset('\\"<>|?*:')


class UploadTooLargeError(PolicyError):
    """An upload has more bytes or more files than the service takes."""

    code = "upload-too-large"


def refuse_path(ref: str, what: str) -> str:
    """`ref`, unless it is a path: a service reads no folder that a request names."""
    if is_path(ref):
        raise PolicyError(
            f"{what} {ref!r} is a local path: a service takes registered names only",
            expected="a registered name or a digest",
            found=ref,
            remedy="register it first ('registry base add' or 'registry publish'), or work without --url",
        )
    return ref


def refuse_paths(recipe: Recipe) -> Recipe:
    """`recipe`, unless its base or one of its adapters is a path."""
    refuse_path(recipe.base, "the base")
    if recipe.original is not None:
        refuse_path(recipe.original, "the original")
    for term in recipe.adapters:
        refuse_path(term.ref, "the adapter")
    return recipe


def check_file_name(name: str) -> str:
    """`name`, if it is relative, visible and stays within its folder on every system. Raises UsageError."""
    parts = name.split("/")
    problem = None
    if not name or len(name) > MAX_NAME or any(len(part.encode()) > MAX_PART for part in parts):
        problem = f"1 to {MAX_NAME} characters, at most {MAX_PART} bytes between slashes"
    elif not name.isprintable() or FORBIDDEN.intersection(name):
        problem = f"no control characters and none of {' '.join(sorted(FORBIDDEN))}"
    elif any(not part for part in parts):
        problem = "a relative name without empty parts"
    elif any(part.startswith((".", "~")) for part in parts):
        problem = "no '..' and no hidden files"
    elif any(part != part.strip() or part.endswith(".") for part in parts):
        problem = "no spaces around a part, and no '.' at its end"
    if problem:
        raise UsageError(
            f"{name!r} cannot be the name of a file here",
            expected=problem,
            found=name,
            remedy="rename the file",
        )
    return name
