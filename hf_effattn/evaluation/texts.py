"""Texts out of files that users have, and texts cut to fit."""

from __future__ import annotations

import gzip
import io
import logging
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..notation import whole_number

logger = logging.getLogger(__name__)
CONTROL = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
)  # and halves of surrogate pairs: no tokenizer takes them
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)  # what reading a damaged .gz raises
INVISIBLE = ["noscript", "script", "style", "template", "title"]
BLOCKS = "address article aside blockquote br caption dd div dl dt figcaption figure footer form h1 h2 h3 h4 h5 h6 "
BLOCKS += "header hr li main nav ol option p pre section table tr ul"
PDF = ".pdf"
EXTRACTED = (".htm", ".html", PDF)  # files whose lines are not those of their texts
HOW = ("error", "truncate_middle", "truncate_end", "slide")


@dataclass(frozen=True)
class Fitted:
    """A text made to fit.

    Args:
        pieces: What is left of it; several that overlap if it was slid over.
        num_tokens: Of the whole text.
        cuts: Ranges of its tokens that are in no piece.
    """

    pieces: list[str]
    num_tokens: int
    cuts: list[tuple[int, int]]


def read_text(path: str | Path) -> str:
    """Return the text of a PDF, an HTML page or any file of plain UTF-8, each also with .gz behind its name.

    Control characters other than tabs and ends of lines are replaced by spaces; a warning says how many.

    Raises:
        ValueError: if the file has no text, is damaged, encrypted or not what its name says.
        ImportError: without pypdf or beautifulsoup4, which the extra `eval` installs.
    """
    return read_marked(path)[0]


def read_marked(path: str | Path) -> tuple[str, str]:
    """Return the text that `read_text` does, and where the first control character was, or an empty text."""
    raw = raw_text(Path(path).expanduser())
    text, replaced = cleaned(raw)
    if replaced:
        logger.warning("%s: %s replaced by spaces", path, counted(replaced, "control character"))
    return text, first_control(path, raw) if replaced else ""


def raw_text(path: Path) -> str:
    """Return the text of a file with its control characters; raises what `read_text` raises."""
    try:
        with opened(path) as file:
            data = file.read()
        if kind(path) == PDF:
            text = _pdf(data)
        elif b"\0" in data:
            raise ValueError(f"byte {data.index(0)} is zero: a binary file, or text that is not UTF-8")
        else:
            text = _html(data) if kind(path) in EXTRACTED else _decoded(data)
        if not cleaned(text)[0].strip():
            raise ValueError("the document is empty")
    except (ValueError, *DAMAGED) as error:
        raise ValueError(f"{path}: {error}") from error
    return text


def cleaned(text: str) -> tuple[str, int]:
    """Return the text with spaces for control characters, and how many these were."""
    return CONTROL.subn(" ", _with_newlines(text))


def first_control(path: str | Path, text: str) -> str:
    """Return the place of the first control character in the text of a file; without the line if it was extracted."""
    lines = _with_newlines(text).split("\n")
    line = next((number for number, line in enumerate(lines, 1) if CONTROL.search(line)), None)
    return str(path) if line is None or kind(Path(path)) in EXTRACTED else f"{path}, line {line}"


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as "1 row" or "2 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def were(number: int, noun: str = "") -> str:
    """Return the beginning of a sentence about things, such as "1 row was" or "2 were"."""
    return f"{counted(number, noun) if noun else f'{number:,}'} {'was' if number == 1 else 'were'}"


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def opened(path: Path) -> Any:
    """Return the file, open for reading bytes that are no longer compressed."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def kind(path: Path) -> str:
    """Return the suffix that says what is in the file, such as ".pdf" for "a.PDF.gz"."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _decoded(data: bytes, encoding: str = "UTF-8-sig") -> str:
    try:
        return data.decode(encoding)
    except LookupError:
        raise ValueError(f"the page says it is in {encoding!r}, which is no known encoding") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"byte {error.start} (line {line}) is not {encoding.removesuffix('-sig')}") from error


def _html(data: bytes) -> str:
    try:
        from bs4 import BeautifulSoup, NavigableString
        from bs4.dammit import EncodingDetector
    except ImportError as error:
        raise ImportError("reading HTML needs beautifulsoup4: pip install 'hf_effattn[eval]'") from error
    marked = data.startswith(b"\xef\xbb\xbf")  # as UTF-8, which then counts more than what the page says
    encoding = None if marked else EncodingDetector.find_declared_encoding(data, is_html=True)
    page = BeautifulSoup(_decoded(data, encoding or "UTF-8-sig"), "html.parser")
    for tag in page(INVISIBLE) + page(hidden=True):
        tag.decompose()
    for node in page(string=True):
        if type(node) is NavigableString and not node.find_parent("pre"):  # other types are comments and the like
            node.replace_with(re.sub(r"\s+", " ", node))
    for tag in page(BLOCKS.split()):
        tag.insert_before("\n")
        tag.append("\n")
    for tag in page(["td", "th"]):
        tag.append(" ")
    lines = (re.sub(r"^ (?! )", "", line.rstrip()) for line in page.get_text().split("\n"))
    return "\n".join(line for line in lines if line)


def _pdf(data: bytes) -> str:
    try:
        import pypdf
    except ImportError as error:
        raise ImportError("reading PDF needs pypdf: pip install 'hf_effattn[eval]'") from error
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        readable = not reader.is_encrypted or reader.decrypt("")  # many open with an empty password
        pages = [page.extract_text() for page in reader.pages] if readable else []
    except Exception as error:  # pypdf meets damaged files with errors of any kind
        raise ValueError(f"the PDF can't be read: {type(error).__name__}: {error}") from error
    if not readable:
        raise ValueError("the PDF is encrypted; it needs a password")
    if not any(page.strip() for page in pages):
        raise ValueError(f"no text in the {counted(len(pages), 'page')} of the PDF; scans need text recognition first")
    return "\n".join(pages)


def fit(text: str, room: int, tokenizer: PreTrainedTokenizerBase, how: str) -> Fitted:
    """Return what of a text fits into `room` tokens, special ones not counted, and what was cut.

    Args:
        how: "error", "truncate_middle" (both ends are kept), "truncate_end", or "slide": pieces that share a tenth.

    Raises:
        ValueError: if the text is too long and `how` is "error", or nothing of it fits.
    """
    whole_number("room", room, 1)
    if how not in HOW:
        raise ValueError(f"unknown way to fit {how!r}; valid: {', '.join(HOW)}")
    total, part = _parts(text, tokenizer)
    if total <= room:
        return Fitted([text], total, [])
    if how == "error":
        raise ValueError(f"the text has {counted(total, 'token')}; there is room for {room:,}")
    if how == "slide":
        return Fitted(_slide(total, part, room, tokenizer), total, [])

    def cut(kept: int) -> tuple[int, int]:
        head = (kept + 1) // 2 if how == "truncate_middle" else kept
        return head, total - kept + head

    def build(kept: int) -> str:
        return part(0, cut(kept)[0]) + part(cut(kept)[1], total)

    kept, piece = _longest(build, room, room, tokenizer)
    return Fitted([piece], total, [cut(kept)])


def _slide(total: int, part: Callable[[int, int], str], room: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    def build(start: int, kept: int) -> str:
        return part(start, start + kept)

    pieces, start, end = [], 0, 0
    while end < total:
        start = max(end - room // 10, min(start + 1, end))
        kept, piece = _longest(partial(build, start), min(room, total - start), room, tokenizer)
        pieces.append(piece)
        end = start + kept
    return pieces


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    # Without `verbose` the tokenizer doesn't warn that the text is longer than the model's context.
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, **options)


def _parts(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, Callable[[int, int], str]]:
    """Return how many tokens a text has, and a function that gives the text of a range of them."""
    if not getattr(tokenizer, "is_fast", False):
        ids = _tokens(text, tokenizer)["input_ids"]
        return len(ids), lambda start, end: str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
    # Decoding may change letters and spaces: where it is known which characters a token stands for, these are taken,
    # each token with what is between it and the one before.
    spans = _tokens(text, tokenizer, return_offsets_mapping=True)["offset_mapping"]
    ends = [0, *accumulate((end for _, end in spans), max)]
    ends[-1] = len(text)
    return len(spans), lambda start, end: text[ends[start] : ends[end]]


def _longest(build: Callable[[int], str], kept: int, room: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """Return how many tokens are kept, of at most `kept`, and their text, which has at most `room` by itself."""
    while kept:
        piece = build(kept)
        excess = len(_tokens(piece, tokenizer)["input_ids"]) - room
        if excess <= 0:
            return kept, piece
        kept -= max(1, min(excess, kept // 2))
    raise ValueError(f"no part of the text has at most {counted(room, 'token')} by itself")
