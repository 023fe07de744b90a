"""Tables and their places in documentation pages. Knows Markdown; refuses to know what is measured."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence


def header(*columns: str) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def row(*values: str) -> str:
    """One line of a table."""
    return "| " + " | ".join(values) + " |"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; one value alone."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def fill(text: str, blocks: Mapping[str, Sequence[str]], page: str) -> str:
    """The page's text with each block's lines between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, lines in blocks.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(block.findall(text)) != 1:
            raise SystemExit(f"{page} has no place for the table {name!r}")
        content = "\n".join(lines)
        text = block.sub(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", text)
    return text
