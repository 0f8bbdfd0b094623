#!/usr/bin/env python3
"""Writes what was changed in a checkout of the published library as edits for apply.py, to standard output.

    docs/upstream/record.py CHECKOUT [--base COMMIT] [--after FIX] [--tests FILE...] > docs/upstream/NN-name/fix.edits

Files that git does not know yet are to be announced with ``git add --intent-to-add``.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
import re
import subprocess

from apply import Edit, digest_of

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")


def git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", checkout, *arguments], check=True, capture_output=True, text=True).stdout


def anchored(lines: list[str], start: int, drop: int, added: list[str]) -> Edit:
    """The edit at index ``start``, with as few lines around it as make the place unique."""
    for around in range(0 if drop else 1, len(lines)):
        for after in range(around + 1):
            first, end = start - around + after, start + drop + after
            if first < 0 or end > len(lines):
                continue
            edit = Edit(first + 1, start - first, drop, after, digest_of(lines[first:end]), added)
            try:
                edit.place(lines)
            except ValueError:
                continue
            return edit
    raise ValueError(f"line {start + 1} is in no unique place")


def edits_of(checkout: Path, base: str, name: str) -> Iterator[Edit]:
    lines = git(checkout, "show", f"{base}:{name}").split("\n")
    hunk = None
    for line in [*git(checkout, "diff", "-U0", base, "--", name).splitlines(), "@@ -0,0 +0,0 @@"]:
        if header := HUNK.match(line):
            if hunk:
                yield anchored(lines, *hunk)
            first, count = int(header[1]), int(header[2] or 1)
            hunk = (first - 1 if count else first, count, [])
        elif hunk and line.startswith("+"):
            hunk[2].append(line[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--base", default="HEAD")
    parser.add_argument("--after", help="the fix that this one builds on; --base is then the checkout with that one applied")
    parser.add_argument("--tests", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.after:
        print("after:", arguments.after)
    if arguments.tests:
        print("tests:", *arguments.tests)
    for line in git(arguments.checkout, "diff", "--name-status", arguments.base).splitlines():
        status, name = line.split("\t")
        if status == "A":
            print(f"new {name}")
            print(*(f"+{text}" for text in (arguments.checkout / name).read_text().splitlines()), sep="\n")
            continue
        print(f"file {name}")
        for edit in edits_of(arguments.checkout, arguments.base, name):
            print(f"at {edit.line} keep {edit.before} drop {edit.drop} keep {edit.after} sha256 {edit.digest}")
            print(*(f"+{text}" for text in edit.added), sep="\n" if edit.added else "", end="\n" if edit.added else "")


if __name__ == "__main__":
    main()
