"""How every command of ours answers a wrong command line: in one line, with the nearest right word, and exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from decoding.errors import nearest


class StrictParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and answers a wrong word with the nearest right one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """End with the message alone: all flags above it would hide it."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def refuse(self, extra: Sequence[str]) -> NoReturn:
        """End with an error about arguments that no flag has taken."""
        wrong = next((word for word in extra if word.startswith("-")), None)
        if wrong is None:
            room = "there can be one MODEL, and " if any(a.dest == "model" for a in self._actions) else ""
            self.error(f"unexpected argument {extra[0]!r}: {room}every other word needs its flag")
        flags = sorted(flag for flag in self._option_string_actions if flag.startswith("--"))
        self.error(f"unknown argument {wrong}: {nearest(wrong.partition('=')[0], flags)}")


def whole_from(least: int) -> Callable[[str], int]:
    """A type of flags: a whole number of at least ``least``."""

    def whole(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole
