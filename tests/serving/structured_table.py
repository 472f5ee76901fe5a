"""The table of engines in docs/serving/structured_output.md, from the records.

`python tests/serving/structured_table.py` writes it.
"""

import re
from pathlib import Path

from spec_kd.serving import SERVING_ENGINES

PAGE = Path(__file__).parents[2] / "docs" / "serving" / "structured_output.md"
TABLE = re.compile(r"(?<=<!-- structured -->\n).*?(?=<!-- end -->)", re.S)


def tabulate():
    """One row for each engine whose structured output is known."""
    lines = ["", "| engine | the draft | drafted tokens that the grammar refuses | read in |", "|---|---|---|---|"]
    for engine in SERVING_ENGINES.values():
        known = engine.structured_output
        if known is not None:
            draft = "is masked too" if known.masks_draft else "proposes what it likes"
            refused = "do not occur" if known.masks_draft else "are counted, with those after them"
            if engine.counting.cuts_refused:
                refused = "are cut, with those after them, and not counted"
            lines.append(f"| {engine.title} | {draft} | {refused} | {known.source} |")
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: tabulate(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
