"""The commands of docs/, as test_readme.py runs those of the README. In a file of its own, so that
two processes share them."""

import pytest
from test_readme import PAGES, checkout, commands_of, run  # noqa: F401

README, *DOCS = PAGES
COMMANDS = dict.fromkeys(command for page in DOCS for command in commands_of(page))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in commands_of(README)])
def test_every_command_of_docs_runs(command, checkout):  # noqa: F811
    run(command, checkout)
