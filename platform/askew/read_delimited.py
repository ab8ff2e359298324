"""CSV, TSV and TREC qrels to Arrow, streamed; every value is text.

Knows nothing of what the columns mean.
"""

import codecs
import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from askew import streams
from askew.errors import DataError
from askew.records import Bad
from askew.streams import Chunk, Place

MAX_ROW_BYTES = 8 << 20
INVALID, END = "\ufdd0", "\ufdd1"  # noncharacters, which no text holds: broken bytes, and a row after the last
QRELS = ("query_id", "iteration", "item_id", "grade")


class Form(NamedTuple):
    """How a file is delimited; `rest`: what a row has too much belongs to its last column."""

    delimiter: str = ","
    header: bool = True
    quoted: bool = True
    rest: bool = False


def read(place: Place, form: Form) -> Iterator[Chunk]:
    """Read a delimited file, first its columns without rows; without a header they are called 1, 2, 3 …

    Set aside: wrong_number_of_columns, invalid_utf8 and unclosed_quote. Raises DataError when it is empty, when
    two columns have the same name, or when a row is larger than MAX_ROW_BYTES.
    """
    with place.open() as stream:
        text = Text(stream)
        names = _names(place, form, text.buffered)
        yield Chunk(pa.table({name: pa.array([], pa.string()) for name in names}), [])
        yield from _rows(place, form, text, names)


def read_qrels(place: Place, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """Read the lines of TREC judgments that begin in bytes [start, stop): query_id, 0, item_id, grade.

    A line with a tab is split at tabs, another at white space.
    """
    with place.open() as stream:
        for block in streams.blocks(stream, start, sys.maxsize if stop is None else stop):
            text = Text(io.BytesIO(b"\n".join(map(_tabs, block.data.splitlines()))))
            yield from _rows(place, Form("\t", header=False, quoted=False), text, QRELS, block.offset)
            if block.too_long is not None:
                message = f"a line of more than {streams.MAX_LINE_BYTES:,} bytes"
                yield Chunk(pa.table({}), [place.bad(f"byte {block.too_long}", "line_too_long", message)])


def _tabs(line: bytes) -> bytes:
    return line.strip() if b"\t" in line else b"\t".join(line.split())


class Text(io.RawIOBase):
    """Bytes as valid UTF-8: no byte order mark, broken bytes marked INVALID, a last row END."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._left = b""
        self._ended = False
        self.any_invalid = False
        self.buffered = io.BufferedReader(cast(io.RawIOBase, self), 1 << 20)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, target: bytearray) -> int:  # type: ignore[override]
        """Fill `target`; returns the number of bytes."""
        while not self._left and not self._ended:
            self._left = self._next()
        taken, self._left = self._left[: len(target)], self._left[len(target) :]
        target[: len(taken)] = taken
        return len(taken)

    def _next(self) -> bytes:
        data = self._stream.read(1 << 18)
        self._ended = not data
        text = self._decoder.decode(data, final=self._ended)
        if END in text or INVALID in text:  # a file that holds them all the same
            self.any_invalid, text = True, text.replace(END, INVALID)
        try:
            piece = text.encode()
        except UnicodeEncodeError:
            self.any_invalid = True
            piece = re.sub("[\ud800-\udfff]+", INVALID, text).encode()
        return piece + f"\n{END}\n".encode() if self._ended else piece


def _names(place: Place, form: Form, text: "io.BufferedReader[io.RawIOBase]") -> list[str]:
    if form.header:
        lines: Iterable[str] = (line.decode() for line in iter(lambda: text.readline(MAX_ROW_BYTES), b""))
    else:
        lines = io.StringIO(text.peek().decode(errors="replace"), newline="")
    try:
        names = next(filter(None, _parse(lines, form)), [END])
    except csv.Error as error:
        do = "end each line by a line feed, and close each quote"
        raise DataError(f"a first row of columns in {place.file}", str(error), do) from None
    if names == [END]:
        raise DataError(f"rows in {place.file}", "an empty file", "fill or remove it")
    if not form.header:
        return [str(number + 1) for number in range(len(names))]
    names = [name.strip() or f"column_{number + 1}" for number, name in enumerate(names)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"columns of different names in {place.file}", f"twice {', '.join(twice)}", "rename one")
    return names


def _parse(lines: Iterable[str], form: Form) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    if form.quoted:
        return csv.reader(lines, delimiter=form.delimiter)
    return csv.reader(lines, delimiter=form.delimiter, quoting=csv.QUOTE_NONE)


def _rows(place: Place, form: Form, text: Text, names: Sequence[str], offset: int = 0) -> Iterator[Chunk]:
    odd = _Odd(place, form, list(names), offset)
    try:
        for batch in _reader(form, text, names, odd):
            table, bad = _checked(place, pa.Table.from_batches([batch]), text.any_invalid)
            yield from place.chunks(pa.concat_tables([table, odd.mended()]), bad + odd.taken())
        yield from place.chunks(odd.mended(), odd.taken())  # of blocks in which no row was as it should be
    except pa.ArrowInvalid as error:
        found = " ".join(str(error).split())[:200]
        do = "close the quote that swallows the rows after it, or set quoted: false"
        raise DataError(f"rows of at most {MAX_ROW_BYTES:,} bytes in {place.file}", found, do) from error


def _reader(form: Form, text: Text, names: Sequence[str], odd: "_Odd") -> pyarrow.csv.CSVStreamingReader:
    return pyarrow.csv.open_csv(
        text.buffered,
        pyarrow.csv.ReadOptions(use_threads=False, column_names=list(names), block_size=MAX_ROW_BYTES),
        pyarrow.csv.ParseOptions(
            delimiter=form.delimiter,
            quote_char='"' if form.quoted else False,
            newlines_in_values=form.quoted,
            invalid_row_handler=odd,
        ),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )


class _Odd:
    """Rows of more or fewer columns than the header: mended if the form allows it, else set aside."""

    def __init__(self, place: Place, form: Form, names: list[str], offset: int) -> None:
        self._place, self._form, self._names, self._offset = place, form, names, offset
        self._bad: list[Bad] = []
        self._mended: list[list[str]] = []

    def __call__(self, row: pyarrow.csv.InvalidRow) -> str:
        """Take a row that Arrow could not; always says to skip it."""
        number = f"row {row.number + self._form.header}" + (f" after byte {self._offset}" if self._offset else "")
        if row.text.strip() == END:
            return "skip"
        if END in row.text:
            self._bad.append(_unclosed(self._place, number))
        elif INVALID in row.text:
            self._bad.append(self._place.bad(number, "invalid_utf8", "the row is no UTF-8"))
        elif self._form.rest and row.actual_columns > row.expected_columns:
            self._mended.append(self._mend(row.text))
        else:
            message = f"{row.actual_columns} columns where {row.expected_columns} were wanted"
            self._bad.append(self._place.bad(number, "wrong_number_of_columns", message))
        return "skip"

    def _mend(self, text: str) -> list[str]:
        values = next(_parse([text], self._form))
        last = len(self._names) - 1
        return [*values[:last], self._form.delimiter.join(values[last:])]

    def taken(self) -> list[Bad]:
        """Hand over what was set aside since the last call."""
        taken, self._bad = self._bad, []
        return taken

    def mended(self) -> pa.Table:
        """Hand over the rows mended since the last call."""
        rows, self._mended = self._mended, []
        columns = zip(*rows, strict=True) if rows else [()] * len(self._names)
        return pa.table([pa.array(column, pa.string()) for column in columns], names=self._names)


def _checked(place: Place, table: pa.Table, any_invalid: bool) -> Chunk:
    """Take out the row END, the row that swallowed it, and rows with broken bytes."""
    bad: list[Bad] = []
    last = table.slice(max(table.num_rows - 1, 0)).to_pylist()
    if last and any(END in value for value in last[0].values()):
        table = table.slice(0, table.num_rows - 1)
        if set(last[0].values()) != {END}:
            bad.append(_unclosed(place, "the last row", next(iter(last[0].values()))))
    if any_invalid:
        broken = pa.array([False] * table.num_rows, pa.bool_())
        for column in table.columns:
            broken = pc.or_(broken, pc.match_substring(column, INVALID).combine_chunks())
        for first in table.column(0).filter(broken).to_pylist():
            shown = first.replace(INVALID, "\ufffd")
            bad.append(place.bad("", "invalid_utf8", "a value of the row is no UTF-8", shown))
        table = table.filter(pc.invert(broken))
    return Chunk(table, bad)


def _unclosed(place: Place, where: str, record_id: str = "") -> Bad:
    message = "a quote is opened and never closed; the rows after it were taken for its text"
    return place.bad(where, "unclosed_quote", message, record_id.replace(END, "").strip()[:80])
