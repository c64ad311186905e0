"""Documents in local files: parquet, JSON lines and plain text, streamed.

Documents come in the order of the files and their rows; those that are null, empty or blank are skipped. Memory
does not grow with the file: one batch or one document is held at a time. A text file is split at SEPARATOR if it
contains one, else at blank lines. Anything wrong with a file raises one UserError that names it. Not supported:
compressed text, other formats.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lab.errors import UserError, one_line

SEPARATOR = "<|endoftext|>"  # between the documents of a text file; without it, blank lines
CHUNK = 1 << 22  # bytes or characters of text read at once

Row = tuple[str, str | None]  # position in the file, text


def digest(text: str) -> bytes:
    """16 bytes that identify a document."""
    return hashlib.sha256(text.encode()).digest()[:16]


def read_documents(paths: Iterable[str], column: str) -> Iterator[str]:
    """The documents of files, in order. Raises UserError with the file and what is wrong with it."""
    for path in paths:
        try:
            for where, text in READERS[Path(path).suffix.lower()](path, column):  # noqa: B007
                if text and not text.isspace():
                    text.encode()  # fails on an unpaired surrogate, which JSON can contain but UTF-8 cannot
                    yield text
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8 or leave it out") from None
        except UnicodeEncodeError:
            raise UserError(f"{path}, {where}: contains an unpaired surrogate; remove it") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: cannot be read ({one_line(error, 160)}); the file is damaged or truncated"
            ) from None


def _read_parquet(path: str, column: str) -> Iterator[Row]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        check_column(path, column, file.schema_arrow)
        for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
            yield from (("", text) for text in batch.column(0).to_pylist())


def check_column(path: str, column: str, schema: pa.Schema) -> None:
    if (count := schema.names.count(column)) != 1:
        problem = f"{count} columns are named {column!r}; rename one, or" if count else f"no column {column!r};"
        raise UserError(f"{path}: {problem} set text_field to one of {', '.join(schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; set text_field to a text column")


def _read_jsonl(path: str, column: str) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _json_text(f"{path}, line {number}", line, column)


def _json_text(where: str, line: str, column: str) -> str | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON; each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; each line must be one")
    if column not in row:
        raise UserError(f"{where}: no field {column!r}; set text_field to one of {', '.join(row) or '(none)'}")
    if not isinstance(row[column], str | None):
        raise UserError(f"{where}: field {column!r} is not text; set text_field to a text field")
    return row[column]


def _read_txt(path: str, column: str) -> Iterator[Row]:
    separated = _has_separator(path)
    with open(path, encoding="utf-8-sig") as file:
        for text in _separated(file) if separated else _paragraphs(file):
            yield "", text.strip()


def _has_separator(path: str) -> bool:
    """Whether a file contains SEPARATOR. Raises UserError if it contains a zero byte. Not with mmap: a file that is
    truncated meanwhile would kill the process."""
    separator, end, found = SEPARATOR.encode(), b"", False
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            if b"\0" in chunk:
                raise UserError(f"{path}: a binary file or UTF-16 text; convert it to UTF-8 or leave it out")
            found = found or separator in end + chunk
            end = chunk[1 - len(separator) :]
    return found


def _separated(file: io.TextIOBase) -> Iterator[str]:
    rest = ""
    while chunk := file.read(CHUNK):
        *whole, rest = (rest + chunk).split(SEPARATOR)
        yield from whole
    yield rest


def _paragraphs(file: io.TextIOBase) -> Iterator[str]:
    lines: list[str] = []
    for line in file:
        if line.isspace():
            yield "".join(lines)
            lines.clear()
        else:
            lines.append(line)
    yield "".join(lines)


READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".json": _read_jsonl, ".txt": _read_txt}
