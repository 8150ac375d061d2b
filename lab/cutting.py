"""Functions, cut out of the project's files and put back into a copy of them."""

import ast
import re
import shutil
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 20_000  # bytes of a student's file


def find(text, name):
    """The lines of a file (before, of, behind) a function, "name" or "Class.name". Raises
    ValueError where there is none."""
    node = ast.parse(text)
    for part in name.split("."):
        nodes = [n for n in node.body if getattr(n, "name", None) == part]
        if not nodes:
            raise ValueError(f"there is no function {part}")
        node = nodes[-1]  # of two with one name Python takes the last
    first = min(n.lineno for n in (node, *node.decorator_list)) - 1
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)  # as Python counts them; splitlines splits more
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
    return cut((ROOT / exercise.file).read_text(encoding="utf-8"), exercise.function)


def written(exercise, work):
    """The student's function, "" if there is none yet; and what then is the matter: not begun, or
    why the file cannot be read."""
    path = Path(work, f"{exercise.name}.py")
    if not path.is_file():
        return "", "not begun"
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes: leave only the function in it")
        function = cut(path.read_text(encoding="utf-8-sig"), exercise.function.split(".")[-1])
        node = ast.parse(function).body[0]
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        return "", f"{path}: {str(error) or 'too deeply nested'}"
    statements = node.body[bool(ast.get_docstring(node)) :]
    untouched = [type(statement) for statement in statements] == [ast.Raise]
    return ("", "not begun") if untouched else (function, "")


def copy_project(folder, functions):
    """Copies the project into a folder, with other texts of some functions: exercise -> text."""
    for name in ("common", "data", "tests"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, Path(folder, name), ignore=skipped)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for exercise, function in functions.items():
        path = Path(folder, exercise.file)
        text = splice(path.read_text(encoding="utf-8"), exercise.function, function)
        path.write_text(text, encoding="utf-8")
