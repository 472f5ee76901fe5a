"""mkdocs: links from a page to files of the repository become links to the repository."""

import re

BLOB = "https://github.com/spec-kd/spec_kd/blob/main/"
RAW = "https://raw.githubusercontent.com/spec-kd/spec_kd/main/"


def on_page_markdown(markdown: str, **_) -> str:
    markdown = re.sub(r"(!\[[^\]]*\])\((?:\.\./)+((?:benchmarks|examples|tests)/[^)]+)\)", rf"\1({RAW}\2)", markdown)
    return re.sub(r"\]\((?:\.\./)+((?:benchmarks|examples|tests)/[^)]+)\)", rf"]({BLOB}\1)", markdown)
