"""Tables of options in docs/command_line.md, made from the parsers. `python tests/cli/options_tables.py` writes it."""

import re
from pathlib import Path

from spec_kd.cli.commands import build_parser
from spec_kd.cli.parsing import OF_LIBRARIES

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"
TABLE = re.compile(r"<!-- options: (?P<command>[^;>]+?)(?:; (?P<group>[^>]+?))? -->\n(?P<table>.*?)<!-- end -->", re.S)


def list_actions(command):
    return [action for actions in build_parser(command).group_options().values() for action in actions]


def tabulate(command, group=None):
    """The options of a command, or of one group of them; the trainer's that are TRL's are left out."""
    groups = build_parser(command).group_options()
    shown = [groups[group]] if group else [actions for title, actions in groups.items() if title != OF_LIBRARIES]
    # the methods of training share options, which stand in the table of the first
    earlier = {"train white_box": ["black_box"], "train online_gkd": ["black_box", "white_box"]}.get(command, ())
    known = {action.dest for name in earlier for action in list_actions(f"train {name}")}
    lines = ["", "| option | meaning | default |", "|---|---|---|"]
    for action in (action for actions in shown for action in actions if action.dest not in known):
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        default = "required" if action.required else "" if action.default is None else f"`{action.default}`"
        help = action.help.replace("%%", "%").replace("|", "\\|")
        lines.append(f"| {names} | {help} | {default} |")
    return "\n".join([*lines, "", ""])


def fill(text):
    """The page with its tables as they should be."""
    pieces, end = [], 0
    for match in TABLE.finditer(text):
        pieces += [text[end : match.start("table")], tabulate(match["command"], match["group"])]
        end = match.end("table")
    return "".join([*pieces, text[end:]])


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
