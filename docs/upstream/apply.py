#!/usr/bin/env python3
"""Applies the edits of a fix to a checkout of the published library.

    docs/upstream/apply.py CHECKOUT EDITS...

An edits file is a patch without the lines that it removes or that surround it: those belong to the library it is for. It names them by number
and by checksum instead.

    after: 01-four-bit-state-dict                   for check.sh: the fix that this one builds on
    tests: tests/test_linear4bit.py                 and the test files of the library, or parts of them, that exercise what is changed
    file bitsandbytes/nn/modules.py
    at 594 keep 2 drop 9 keep 1 sha256 5f0c...      lines 594 to 605 have this checksum; 2 stay, 9 go, the last one stays
    +    new lines, each after a plus sign, take the place of those that go
    new bitsandbytes/nn/checkpoint.py               a file that does not exist yet
    +its lines

Lines that have moved are found by their checksum. If they have changed, or exist twice, nothing is applied to any file.
"""

import argparse
from dataclasses import dataclass, field
import hashlib
from pathlib import Path
import sys


@dataclass
class Edit:
    """Replaces ``drop`` lines that have ``before`` lines before and ``after`` lines after them; ``line`` is the first of all, counted from 1."""

    line: int
    before: int
    drop: int
    after: int
    digest: str
    added: list[str] = field(default_factory=list)

    @property
    def span(self) -> int:
        return self.before + self.drop + self.after

    def place(self, lines: list[str]) -> int:
        """Index of the first line of the place that is meant.

        Raises:
            ValueError: there is none, or more than one.
        """
        places = [i for i in range(len(lines) - self.span + 1) if digest_of(lines[i : i + self.span]) == self.digest]
        if len(places) != 1:
            raise ValueError(f"lines {self.line} to {self.line + self.span - 1} were found {len(places)} times")
        return places[0]


def digest_of(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def read(path: Path) -> dict[str, list[Edit] | list[str]]:
    """What an edits file says: for every file its edits, or for a new one its lines."""
    changes: dict[str, list] = {}
    target: list = []
    added: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("+"):
            added.append(line[1:])
            continue
        match line.split():
            case ["file", name]:
                target = changes.setdefault(name, [])
            case ["new", name]:
                added = changes.setdefault(name, [])
            case ["at", first, "keep", before, "drop", drop, "keep", after, "sha256", digest]:
                edit = Edit(int(first), int(before), int(drop), int(after), digest)
                target.append(edit)
                added = edit.added
            case [] | ["after:" | "tests:", *_]:
                pass
            case _:
                raise ValueError(f"{path}:{number}: not understood: {line}")
    return changes


def edited(text: str, edits: list[Edit]) -> str:
    """``text`` with the edits made."""
    lines = text.split("\n")
    placed = [(edit.place(lines) + edit.before, edit) for edit in edits]
    for start, edit in sorted(placed, key=lambda pair: pair[0], reverse=True):
        lines[start : start + edit.drop] = edit.added
    return "\n".join(lines)


def result(checkout: Path, name: str, change: list) -> str:
    """The new text of one file.

    Raises:
        ValueError: the change does not fit the checkout.
    """
    path = checkout / name
    if change and isinstance(change[0], Edit):
        if not path.is_file():
            raise ValueError(f"{name} does not exist")
        try:
            return edited(path.read_text(), change)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if path.exists():
        raise ValueError(f"{name} exists already")
    return "\n".join(change) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("edits", type=Path, nargs="+")
    arguments = parser.parse_args()
    for path in arguments.edits:
        try:
            texts = {name: result(arguments.checkout, name, change) for name, change in read(path).items()}
        except (ValueError, OSError) as error:
            print(f"{path} does not apply: {error}", file=sys.stderr)
            return 1
        for name, text in texts.items():
            target = arguments.checkout / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
