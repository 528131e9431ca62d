"""The commands: all are listed, all are there, and each explains itself."""

import re

import pytest

from fastmim import cli


def test_usage_lists_every_command_and_no_other(capsys):
    assert re.findall(r"^  ([a-z-]+)  ", cli.USAGE, re.MULTILINE) == list(cli.COMMANDS)
    assert cli.run([]) == cli.run(["--help"]) == 0
    assert capsys.readouterr().out == f"{cli.USAGE}\n{cli.USAGE}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    try:
        code = cli.run([command, "--help"])
    except SystemExit as left:  # of the parser
        code = left.code
    assert code == 0
    said = capsys.readouterr().out
    assert said.removeprefix("usage: ").startswith(f"fastmim {command} ") and len(said.splitlines()) > 3


def test_a_command_that_is_not_there_is_one_line_with_the_nearest(capsys):
    assert cli.run(["verify"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: fastmim: expected a command (train, ")
        and "got verify; did you mean verify-data?" in said
    )
