"""docs/command_line.md says what the parsers say."""

import re

import pytest
from options_tables import PAGE, TABLE, tabulate

from spec_kd.cli import commands, recipe_format
from spec_kd.cli.main import COMMANDS

TEXT = PAGE.read_text(encoding="utf-8")
TABLES = list(TABLE.finditer(TEXT))


@pytest.mark.parametrize("match", TABLES, ids=lambda match: match["command"] + (match["group"] or ""))
def test_a_table_of_options_is_that_of_the_parser(match):
    """`python tests/cli/options_tables.py` writes the tables."""
    assert match["table"] == tabulate(match["command"], match["group"])


def test_every_command_has_its_table():
    assert {match["command"] for match in TABLES} == set(commands.COMMANDS)


def test_every_command_is_listed_with_its_text():
    listed = dict(re.findall(r"^\| `spec-kd ([\w-]+)` \| (.*?) \|$", TEXT, re.MULTILINE))
    assert listed == COMMANDS


def test_the_format_of_recipes_is_the_text_of_help():
    assert recipe_format.__doc__ in TEXT
