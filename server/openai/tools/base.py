"""What the parsers of all tool formats share: text and calls in the order in which they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.openai.marker_scan import MarkerScan
from server.openai.pieces import CallArguments, CallFailed, CallStart, Piece, Text
from server.openai.tools.call_json import CallReader, Status

_SLICE = 1024  # characters worked on at once: slicing what is left stays cheap, however much a push brings

State = Callable[[str], str]  # takes from a text that is not empty, returns the rest


@dataclass(frozen=True)
class Offer:
    """What a parser must know of the request.

    Attributes:
        names: of the functions that may be called.
        new_id: makes a call's id.
        hidden: markers that the client is not to see when they mark no call: the tokenizer's special tokens.
        schemas: of the parameters of each function.
    """

    names: frozenset[str]
    new_id: Callable[[], str]
    hidden: frozenset[str] = frozenset()
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Reader(Protocol):
    """Reads one call, a character a step.

    Attributes:
        name: of the function, once it is known.
        begun: the name is known, and arguments come, or there are none.
        unread: characters that were taken and, now that this is broken, may begin something else.
    """

    name: str | None
    begun: bool
    unread: str

    def step(self, char: str) -> Status: ...

    def take(self) -> str: ...


class ToolParser(ABC):
    """Reads one output as it comes.

    What looks like a call and is none becomes text, in the characters that it was written with; that a call has failed
    may show only after it began (``CallFailed``). No push raises, and a character costs the same wherever it stands.
    White space before the first call, between calls and behind the last is not text.

    A format is a set of states. Each takes what it can from the text, and sets ``_state`` for the rest.
    """

    markers: tuple[str, ...] = ()  # what calls begin with

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._scan = MarkerScan({*self.markers, *offer.hidden})
        self._state: State = self._in_text
        self._pieces: list[Piece] = []
        self._blank: list[str] | None = []  # white space at the start or behind a call; None: in the middle of a text
        self._raw: list[str] = []  # what the present call was written with
        self._reader: Reader | None = None
        self._calls = 0
        self._started = False  # the present call has been told

    def push(self, text: str) -> list[Piece]:
        """The pieces that ``text`` makes certain."""
        for begin in range(0, len(text), _SLICE):
            rest = text[begin : begin + _SLICE]
            while rest:
                rest = self._state(rest)
        return self._taken()

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """The output ends here: what was held back.

        Args:
            cut: by the limit of tokens. A call that has begun stays one, with the arguments that came.
        """
        if not (cut and self._started):
            self._end()
        if self._blank and not self._calls:
            self._pieces.append(Text("".join(self._blank)))
        self._blank = []
        return self._taken()

    @abstractmethod
    def _marked(self, marker: str) -> None:
        """One of ``markers`` has come: set the state for what follows it."""

    @abstractmethod
    def _called(self) -> None:
        """A call is complete: set the state for what follows it."""

    def _end(self) -> None:
        """The output ends in the present state."""
        if self._state == self._in_text:
            self._say(self._scan.flush())
        else:
            self._give_up()

    def _in_text(self, text: str) -> str:
        before, marker, rest = self._scan.push(text)
        self._say(before)
        if marker is not None and marker in self.markers:
            self._raw = [marker]
            self._marked(marker)
        return rest

    def _say(self, text: str) -> None:
        if self._blank is not None and (not text or text.isspace()):
            self._blank.append(text)
        elif text:
            self._pieces.append(Text("".join([*(self._blank or ()), text])))
            self._blank = None

    def _skip_space(self, text: str) -> str:
        """The text behind the white space that it begins with, which is part of the call."""
        stripped = text.lstrip()
        self._raw.append(text[: len(text) - len(stripped)])
        return stripped

    def _read(self, reader: Reader | None = None) -> None:
        """A call comes next: by default, an object with name and arguments."""
        self._reader = reader or CallReader(self._offer.names)
        self._state = self._in_call

    def _in_call(self, text: str) -> str:
        reader = self._reader
        assert reader is not None
        status, place = Status.MORE, 0
        while place < len(text) and status is Status.MORE:
            status = reader.step(text[place])
            place += status is not Status.BROKEN
        self._raw.append(text[:place])
        self._tell(reader)
        if status is Status.BROKEN:
            self._give_up(reader.unread)
            return reader.unread + text[place:]
        if status is Status.DONE:
            self._complete()
        return text[place:]

    def _tell(self, reader: Reader) -> None:
        if reader.begun and not self._started:
            assert reader.name is not None
            self._started = True
            self._raw[:0], self._blank = self._blank or [], []  # told only if this turns out to be no call
            self._pieces.append(CallStart(self._calls, self._offer.new_id(), reader.name))
        if arguments := reader.take():
            self._pieces.append(CallArguments(self._calls, arguments))

    def _complete(self) -> None:
        self._calls += 1
        self._blank = []
        self._clear()
        self._called()

    def _give_up(self, unread: str = "") -> None:
        """This is no call: it is text, but for ``unread``, and text follows."""
        raw = "".join(self._raw).removesuffix(unread)
        for marker in self._offer.hidden:
            raw = raw.replace(marker, "")
        if self._started:
            self._pieces.append(CallFailed(self._calls, raw))
            self._calls += 1
            self._blank = None
        else:
            self._say(raw)
        self._clear()
        self._state = self._in_text

    def _clear(self) -> None:
        self._raw, self._reader, self._started = [], None, False

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces
