"""Make the links of the README absolute, in place, for the package index, which has no files beside it.

Usage, in a job of GitHub Actions, which sets the address of the repository: python index_readme.py README.md
"""

import os
import re
import sys
from pathlib import Path


def with_absolute_links(text: str, pages: str, files: str) -> str:
    """Put addresses before relative targets.

    Args:
        text: Markdown.
        pages: address before the path of a file, as a page to read.
        files: address before the path of a picture, as the file itself.

    Example:
        >>> with_absolute_links("![a](b.png) [c](d.md#e) [f](https://g.h)", "https://x/blob", "https://x/raw")
        '![a](https://x/raw/b.png) [c](https://x/blob/d.md#e) [f](https://g.h)'
    """
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\g<1>{files}/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{pages}/", text)


def main() -> None:
    """Rewrite the file that is named."""
    path = Path(sys.argv[1])
    home = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    version = os.environ["GITHUB_SHA"]
    text = with_absolute_links(path.read_text(encoding="utf-8"), f"{home}/blob/{version}", f"{home}/raw/{version}")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
