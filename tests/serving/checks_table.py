"""The table of checks in docs/serving/index.md, from the records. `python tests/serving/checks_table.py` writes it."""

import re
from pathlib import Path

from spec_kd.serving import SERVING_ENGINES

PAGE = Path(__file__).parents[2] / "docs" / "serving" / "index.md"
TABLE = re.compile(r"(?<=<!-- checks -->\n).*?(?=<!-- end -->)", re.S)


def tabulate():
    """One row for each check, with what every engine does with a pair that fails it."""
    rows = {}
    for engine in SERVING_ENGINES.values():
        for check in engine.checks:
            rows.setdefault(check.name, {})[engine.name] = check.consequence
            rows[check.name].setdefault("", check.find.__doc__)
    titles = [engine.title for engine in SERVING_ENGINES.values()]
    lines = ["", f"| check | what is wrong | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for name, row in rows.items():
        cells = [row.get(engine, "") for engine in SERVING_ENGINES]
        lines.append(f"| `{name}` | {row['']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: tabulate(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
