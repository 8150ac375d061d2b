"""Functions, cut out of the project's files and put back into a copy of them."""

import ast
import shutil
import textwrap
from pathlib import Path

from common.options import InputError

ROOT = Path(__file__).resolve().parents[1]


def find(text, name):
    """Where the lines of a function, "name" or "Class.name", are in the text: (first, last). Raises
    InputError where there is none."""
    node = ast.parse(text)
    for part in name.split("."):
        found = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part]
        if not found:
            raise InputError(f"there is no {part} in it")
        node = found[0]
    first = min(n.lineno for n in (node, *node.decorator_list)) - 1
    return first, node.end_lineno


def cut(text, name):
    """The text of a function, its first line without indentation."""
    first, last = find(text, name)
    return textwrap.dedent("".join(text.splitlines(keepends=True)[first:last]))


def splice(text, name, function):
    """The file `text` with another text in place of a function; all else stays byte for byte."""
    first, last = find(text, name)
    lines = text.splitlines(keepends=True)
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    return "".join([*lines[:first], textwrap.indent(function, indent), *lines[last:]])


def stub(exercise):
    """What a student begins with: the signature, the docstring, and nothing behind it."""
    function = cut((ROOT / exercise.file).read_text(), exercise.function)
    body = ast.parse(function).body[0].body
    documented = ast.get_docstring(ast.parse(function).body[0]) is not None
    kept = body[0].end_lineno if documented else body[0].lineno - 1
    head = "".join(function.splitlines(keepends=True)[:kept])
    about = f"# From {exercise.file}, whose names and imports you can use. Helpers go inside.\n"
    about += f"# python lab/lab.py check {exercise.name}\n\n"
    return f"{about}{head}    raise NotImplementedError\n"


def written(exercise, work):
    """The student's function, or None where it is not begun. Raises InputError for a file that is
    not Python, or without the function."""
    path = Path(work, f"{exercise.name}.py")
    if not path.is_file():
        raise InputError(f"{path} is missing: python lab/lab.py start")
    try:
        function = cut(path.read_text(encoding="utf-8"), exercise.function.split(".")[-1])
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (OSError, ValueError) as error:  # not UTF-8, or bytes that are no text
        raise InputError(f"{path} cannot be read: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return None if "raise NotImplementedError" in function else function


def copy_project(folder, functions):
    """A copy of the project as it is now, with other texts in place of some functions.

    functions: exercise -> text."""
    for path in ROOT.glob("*.py"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    for name in ("common", "data", "bench", "lab", "tests"):  # and no other folder that is there
        skipped = shutil.ignore_patterns(".*", "work", "img", "__pycache__")
        shutil.copytree(ROOT / name, Path(folder, name), ignore=skipped)
    for exercise, function in functions.items():
        path = Path(folder, exercise.file)
        path.write_text(splice(path.read_text(), exercise.function, function))
