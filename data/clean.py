"""Text cleaning: small pure functions from str to str (or to pieces), chosen by the domain that needs them."""

import re
from collections.abc import Iterator

# The year and edition differ between files, "THE"/"THIS" too; the title may wrap over a line.
_PG_START = re.compile(r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.{0,300}?\*\*\*[^\n]*\n", re.M | re.S)
_PG_END = re.compile(r"^(?:\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg)", re.M)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?^---[ \t]*(?:\n|\Z)", re.M | re.S)
_PARAGRAPH = re.compile(r"(?<=\n\n)(?=[^\r\n])|(?<=\n\r\n)(?=[^\r\n])")
_WIKI_TITLE = re.compile(r"^ = (?!=)(.+?)(?<!=) = *$", re.M)


def lf(text: str) -> str:
    """CRLF and lone CR become LF."""
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
    heads = list(_WIKI_TITLE.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=True):
        yield head.group(1).strip(), text[head.start() : end].strip() + "\n"


def cut(text: str, max_bytes: int) -> list[str]:
    """Cut at paragraph ends into pieces of at most `max_bytes`, at line ends where one paragraph is longer, and inside
    a line only where the line itself is. The pieces concatenate to `text`.
    """
    return _pack(_PARAGRAPH.split(text), max_bytes, lambda long: _pack(lines(long), max_bytes, _hard(max_bytes)))


def lines(text: str) -> list[str]:
    """Lines with their ends."""
    # Not str.splitlines: that also cuts at form feeds and Unicode separators.
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _hard(max_bytes: int):
    step = max(1, max_bytes // 4)  # a character is at most 4 bytes of UTF-8
    return lambda line: [line[i : i + step] for i in range(0, len(line), step)]


def _pack(parts: list[str], max_bytes: int, smaller) -> list[str]:
    """Join neighbours while they fit; a part that alone is too long is first cut by `smaller`."""
    pieces, held, size = [], [], 0
    for part in parts:
        n = len(part.encode())
        if size + n > max_bytes and held:
            pieces.append("".join(held))
            held, size = [], 0
        if n > max_bytes:
            *full, part = smaller(part)
            pieces.extend(full)
            n = len(part.encode())
        held.append(part)
        size += n
    return pieces + (["".join(held)] if held else [])
