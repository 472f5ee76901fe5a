"""mkdocs: pictures of the repository are files of the site, links to its files lead to GitHub, formulas are MathML."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent
BLOB = "https://github.com/spec-kd/spec_kd/blob/main/"
PICTURES = ("benchmarks/results", "experiments")
OUTSIDE = r"(?:\.\./)+((?:benchmarks|examples|experiments|tests)/[^)]+)\)"


def on_files(files, config):
    for path in sorted(path for folder in PICTURES for path in (ROOT / folder).rglob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    to_root = "../" * page.file.src_uri.count("/")
    markdown = re.sub(rf"(!\[[^\]]*\])\({OUTSIDE}", rf"\1({to_root}\2)", markdown)
    return re.sub(rf"(?<!\!)(\[[^\]]*\])\({OUTSIDE}", rf"\1({BLOB}\2)", markdown)


def on_page_content(content, **_):
    def render(match):
        is_block = match[1] == "div"
        return convert(html.unescape(match[2].strip()[2:-2]), display="block" if is_block else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', render, content, flags=re.S)
