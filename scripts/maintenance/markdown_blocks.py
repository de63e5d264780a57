"""Generated parts of Markdown pages: each stands between two comments that name it."""

import re
from pathlib import Path

from timm_bcos.files import atomic_path

DOCS = Path(__file__).parents[2] / "docs"


def replace_block(page: Path, name: str, text: str) -> None:
    """Write `text` between `<!-- NAME: ... -->` and `<!-- end of NAME -->`.

    Raises:
        SystemExit: If the page has no such place.
    """
    pattern = rf"(<!-- {re.escape(name)}: [^\n]* -->\n).*?(<!-- end of {re.escape(name)} -->)"
    old = page.read_text(encoding="utf-8")
    new, count = re.subn(pattern, lambda found: found[1] + text + found[2], old, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page} has {count} places for {name!r}: mark one by two comments")
    with atomic_path(page) as path:
        path.write_text(new, encoding="utf-8")


def block(page: Path, name: str) -> str:
    """What stands there now; empty where the page has no such place."""
    pattern = rf"<!-- {re.escape(name)}: [^\n]* -->\n(.*?)<!-- end of {re.escape(name)} -->"
    found = re.search(pattern, page.read_text(encoding="utf-8"), re.DOTALL)
    return found[1] if found else ""


def markdown_table(header: list[str], rows: list[list[str]], numeric_from: int = 1) -> str:
    """A table whose columns from `numeric_from` on are aligned to the right."""
    rule = ["---" if i < numeric_from else "---:" for i in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])
