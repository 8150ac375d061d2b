"""Reads the docstrings, code and comments of installed Python packages.

    entries = read_packages(["stdlib", "torch"])

Source files are parsed with `ast`; nothing is imported or run.
"""

import ast
import gc
import importlib.util
import inspect
import re
import string
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test"}
SKIPPED_FOLDERS |= {"_vendor", "site-packages", "dist-packages"}
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
DEFINITIONS = ast.ClassDef, *FUNCTIONS
COMMENT_AND_CODE = re.compile(  # lines of a comment, and up to 20 lines that are indented as far
    r"^([ \t]*)(# .*\n(?:[ \t]*#.*\n)*)((?:\1[ \t]*[^\s#].*\n){0,20})", re.M
)


@dataclass
class Entry:
    """A text about Python, and code that belongs to it."""

    kind: str  # "docstring", "comment", or "name": a function without a docstring
    package: str
    module: str
    name: str  # qualified: torch.nn.modules.linear.Linear.forward; "" of a comment
    text: str  # the docstring, comment or name
    code: str = ""  # a function without its docstring; the lines below a comment


def read_packages(packages):
    """All entries of installed packages, in the order of their files."""
    jobs = [job for package in packages for job in source_files(package)]
    modules = {module for _, _, module in jobs}
    with Pool(initializer=gc.disable) as pool:  # collecting garbage in syntax trees is slow
        entries = sum(pool.map(read_file, jobs, chunksize=16), [])
    for entry in entries:  # an attached docstring belongs to the module that its name begins with
        while entry.module not in modules and "." in entry.module:
            entry.module = entry.module.rpartition(".")[0]
    return entries


def package_root(package):
    """The folder of an installed package, or its single file; None if it is not installed."""
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    try:
        path = Path(importlib.util.find_spec(package).origin)
    except (ImportError, AttributeError, TypeError):  # not there, or a folder of none
        return None
    if path.suffix != ".py":
        return None
    return path.parent if path.name == "__init__.py" else path


def source_files(package):
    """(package, path, module name) of each source file, without tests."""
    root = package_root(package)
    if root.is_file():
        return [(package, root, root.stem)]
    files = []
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.pyi")]):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            parts = parts if package == "stdlib" else (package, *parts)
            files.append((package, path, ".".join(part for part in parts if part != "__init__")))
    return files


# ------------------------------------------------------------------------------------------------
# Reading a source file


def read_file(job):
    """The entries of one source file."""
    package, path, module = job
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # a template, or written for another Python
    lines, entries = source.splitlines(), []

    def visit(node, name):
        """Visits a module and all definitions in it, however deep."""
        documented = isinstance(node, (ast.Module, *DEFINITIONS))
        docstring = ast.get_docstring(node) if documented else None
        code = function_code(node, lines, docstring) if isinstance(node, FUNCTIONS) else ""
        if docstring:
            entries.append(Entry("docstring", package, module, name, plain_text(docstring), code))
        elif code:
            entries.append(Entry("name", package, module, name, name, code))
        for block in ("body", "orelse", "handlers", "finalbody"):  # also of `if`, `try`, `with`
            for child in getattr(node, block, ()):
                if hasattr(child, "body"):  # most statements have none
                    visit(child, f"{name}.{child.name}" if isinstance(child, DEFINITIONS) else name)

    visit(tree, module)
    attached = []
    if "add_docstr" in source or "add_newdoc" in source:
        attached = attached_docstrings(tree)
    if module == "pydoc_data.topics":  # one dictionary: topic -> section of the language reference
        topics = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
        attached = [(f"topics.{key}", text) for key, text in ast.literal_eval(topics).items()]
    for name, text in attached:
        entries.append(Entry("docstring", package, name, name, plain_text(text)))
    for comment, code in commented_code(lines):
        entries.append(Entry("comment", package, module, "", comment, code))
    return entries


def function_code(node, lines, docstring):
    """The source of a function without its docstring; "" if nothing else is in it."""
    kept, first = lines[node.lineno - 1 : node.end_lineno], node.body[0]
    if docstring:
        del kept[first.lineno - node.lineno : first.end_lineno - node.lineno + 1]
    return inspect.cleandoc("\n" + "\n".join(kept)) if len(node.body) > bool(docstring) else ""


def attached_docstrings(tree):
    """(name, docstring) of compiled functions, to which Python code attaches it: torch's
    `add_docstr(torch.abs, "...")`, numpy's `add_newdoc("numpy", "flatiter", "...")`."""
    shared = defaultdict(str)  # the texts that torch inserts with `.format(**common_args)`
    calls = [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    for called, call in calls:
        if called == "parse_kwargs":
            for text in re.split(r"\n {4}(?! )", call.args[0].value):
                shared[text.split(" ")[0].strip()] = text.strip()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    shared.setdefault(key.value, string_value(value, {}))

    for called, call in calls:
        if not re.search(r"\badd_(docstr|docstr_all|newdoc)$", called) or len(call.args) < 2:
            continue
        *place, text = call.args
        if isinstance(text, ast.Tuple) and len(text.elts) == 2:  # numpy: an attribute and its text
            place, text = [*place, text.elts[0]], text.elts[1]
        parts = [p.value if isinstance(p, ast.Constant) else ast.unparse(p) for p in place]
        name = ".".join(["torch.Tensor", *parts] if called.endswith("_all") else parts)
        if docstring := string_value(text, shared):
            yield name, inspect.cleandoc(docstring)


def string_value(node, shared):
    """The value of a string expression: constants, sums and `.format(...)`; "" for others."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        return string_value(node.left, shared) + string_value(node.right, shared)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        template, values = string_value(node.func.value, shared), shared.copy()
        values.update({k.arg: string_value(k.value, shared) for k in node.keywords if k.arg})
        try:
            return string.Formatter().vformat(template, (), values)
        except (ValueError, LookupError):
            return template
    return ""


def plain_text(docstring):
    """A docstring without roles and backticks, and without the signatures at its beginning."""
    text = re.sub(r"\A[\w.]+\((?s:.*?)\)\n--\n+", "", docstring)
    text = re.sub(r":[\w:]+:`~?([^`]+)`", r"\1", text).replace("`", "")
    while match := re.match(r"[\w.]+\([^\n]*(\n +[^\n]*)*\)( ->[^\n]*)?\n\n+", text):
        text = text[match.end() :]
    return text.strip()


def commented_code(lines):
    """(comment, code below it) for each comment that has lines of its own."""
    for match in COMMENT_AND_CODE.finditer("\n".join([*lines, ""])):
        indent, comment, code = match.groups()
        comment = " ".join(line.strip(" \t#") for line in comment.splitlines())
        legal = re.search(r"copyright|licen[cs]e|noqa|pyre|mypy", comment, re.I)
        if comment[:1].isupper() and not legal:
            yield comment, "\n".join(line[len(indent) :] for line in code.splitlines())
