"""Functions, cut out of the project's files and put back into a copy of them."""

import ast
import shutil
import textwrap
from pathlib import Path

from common.options import InputError

ROOT = Path(__file__).resolve().parents[1]


def find(text, name):
    """The lines of a file (before, of, behind) a function, "name" or "Class.name". Raises
    ValueError where there is none."""
    node = ast.parse(text)
    for part in name.split("."):
        found = [n for n in node.body if getattr(n, "name", None) == part]
        if not found:
            raise ValueError(f"there is no function {part}")
        node = found[-1]  # of two with one name Python takes the last
    first = min(n.lineno for n in (node, *node.decorator_list)) - 1
    lines = text.splitlines(keepends=True)
    return lines[:first], lines[first : node.end_lineno], lines[node.end_lineno :]


def cut(text, name):
    """The text of a function, its first line without indentation."""
    return textwrap.dedent("".join(find(text, name)[1]))


def splice(text, name, function):
    """The file `text` with another text in place of a function; all else stays byte for byte."""
    before, old, behind = find(text, name)
    indent = old[0][: len(old[0]) - len(old[0].lstrip())]
    return "".join([*before, textwrap.indent(function, indent), *behind])


def real(exercise):
    """The text of the project's own function: the solution."""
    return cut((ROOT / exercise.file).read_text(), exercise.function)


def stub(exercise):
    """What a student begins with: the signature, the docstring, and nothing behind it."""
    node = ast.parse(real(exercise)).body[0]
    kept = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    head = "".join(real(exercise).splitlines(keepends=True)[:kept])
    about = f"# From {exercise.file}, whose names and imports you can use. Helpers go inside.\n"
    about += f"# python lab/lab.py check {exercise.name}\n\n"
    return f"{about}{head}    raise NotImplementedError\n"


def written(exercise, work):
    """The student's function, or None where it is not begun. Raises InputError for a file that is
    not Python, or without the function."""
    path = Path(work, f"{exercise.name}.py")
    if not path.is_file():
        return None
    try:
        function = cut(path.read_text(encoding="utf-8"), exercise.function.split(".")[-1])
    except (SyntaxError, ValueError) as error:  # ValueError: also bytes that are no text
        raise InputError(f"{path}: {error}") from None
    return None if "raise NotImplementedError" in function else function


def copy_project(folder, functions):
    """Copies the project into a folder, with other texts in place of some functions.

    functions: exercise -> text."""
    for name in ("common", "data", "tests"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, Path(folder, name), ignore=skipped)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for exercise, function in functions.items():
        path = Path(folder, exercise.file)
        path.write_text(splice(path.read_text(), exercise.function, function))
