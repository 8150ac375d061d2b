"""The commands of docs/, as test_readme.py runs those of the README. In a file of its own, so that
two processes share them."""

import importlib
import re
import shlex

import pytest
from test_readme import PAGES, checkout, commands_of, run  # noqa: F401

README, *DOCS = PAGES
COMMANDS = dict.fromkeys(command for page in DOCS for command in commands_of(page))
FIRST = {}  # of the commands of a bench that begin with the same word, only the first one runs
for command in COMMANDS:
    FIRST.setdefault(re.match(r"python bench/\w+.py ?[a-z]*|.*", command)[0], command)


@pytest.mark.parametrize("command", [c for c in FIRST.values() if c not in commands_of(README)])
def test_every_command_of_docs_runs(command, checkout):  # noqa: F811
    run(command, checkout)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in FIRST.values()])
def test_the_options_of_further_commands_of_a_bench_exist(command):
    script, *arguments = shlex.split(command)[1:]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as left:  # options before --help are read
        module.main([*arguments, "--help"])
    assert left.value.code == 0
