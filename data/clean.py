"""Text cleaning: small pure functions from a string to a string or to pieces, chosen by the domain that needs them."""

import re
from collections.abc import Callable, Iterator

# The year and edition differ between files, "THE"/"THIS" too; the title may wrap over a line.
_PG_START = re.compile(r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.{0,300}?\*\*\*[^\n]*\n", re.M | re.S)
_PG_END = re.compile(r"^(?:\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg)", re.M)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?^---[ \t]*(?:\n|\Z)", re.M | re.S)
_PARAGRAPH = re.compile(r"(?<=\n\n)(?=[^\r\n])|(?<=\n\r\n)(?=[^\r\n])")
_WIKI_TITLE = re.compile(r"^ = (?!=)(.+?)(?<!=) = *$", re.M)


def lf(text: str) -> str:
    """Replace CRLF and lone CR by LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def strip_gutenberg(text: str) -> str:
    """Drop Project Gutenberg's header and licence footer; a text without the markers is returned unchanged."""
    start = _PG_START.search(text)
    if start is None:
        return text
    end = _PG_END.search(text, start.end())
    return text[start.end() : end.start() if end else len(text)].strip("\n") + "\n"


def strip_front_matter(text: str) -> str:
    """Drop a leading YAML block between two `---` lines."""
    return _FRONT_MATTER.sub("", text, count=1).lstrip("\n")


def wikitext_articles(text: str) -> Iterator[tuple[str, str]]:
    """Yield (title, article) at each ` = Title = ` heading; deeper headings (` = = `) stay inside their article."""
    headings = list(_WIKI_TITLE.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends, strict=True):
        yield heading.group(1).strip(), text[heading.start() : end].strip() + "\n"


def lines(text: str) -> list[str]:
    """Split into lines, keeping their ends."""
    # Not str.splitlines, which also splits at form feeds and Unicode separators.
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def cut(text: str, max_bytes: int) -> list[str]:
    """Cut a text into pieces of at most `max_bytes` of UTF-8, which concatenate to the text.

    Pieces end at paragraphs; a longer paragraph is cut at line ends, and only a longer line is cut inside.
    """
    return _fill(_PARAGRAPH.split(text), max_bytes, lambda paragraph: _cut_lines(paragraph, max_bytes))


def _cut_lines(paragraph: str, max_bytes: int) -> list[str]:
    step = max(1, max_bytes // 4)  # a character has at most 4 bytes of UTF-8
    return _fill(lines(paragraph), max_bytes, lambda line: [line[i : i + step] for i in range(0, len(line), step)])


def _fill(parts: list[str], max_bytes: int, cut_part: Callable[[str], list[str]]) -> list[str]:
    """Join neighbouring parts while they fit; cut a part that is too long alone by `cut_part` first."""
    pieces, pending, size = [], [], 0
    for part in parts:
        n = len(part.encode())
        if size + n > max_bytes and pending:
            pieces.append("".join(pending))
            pending, size = [], 0
        if n > max_bytes:
            *full, part = cut_part(part)
            pieces.extend(full)
            n = len(part.encode())
        pending.append(part)
        size += n
    return pieces + (["".join(pending)] if pending else [])
