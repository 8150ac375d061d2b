"""Reads the docstrings, code and comments of installed Python packages.

    entries, snippets = read_packages(["stdlib", "torch"])

Source files are parsed with `ast`; nothing is imported or run.
"""

import ast
import gc
import importlib.metadata
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


@dataclass
class Entry:
    """A docstring: of a module, class or function; or a topic of the language reference."""

    package: str
    module: str
    name: str  # qualified: torch.nn.modules.linear.Linear.forward
    docstring: str
    code: str = ""  # of a function: its source without the docstring


@dataclass
class Snippet:
    """Code with a few words about it: a comment and the code below it, or the qualified name of a
    function without a docstring and its code."""

    package: str
    module: str
    kind: str  # "comment" or "name"
    text: str
    code: str


def read_packages(packages):
    """All entries and snippets of installed packages, in the order of their files."""
    jobs = [job for package in packages for job in source_files(package)]
    modules = {module for _, _, module in jobs}
    entries, snippets = [], []
    with Pool(initializer=gc.disable) as pool:  # collecting garbage in syntax trees is slow
        for found_entries, found_snippets in pool.map(read_file, jobs, chunksize=16):
            entries += found_entries
            snippets += found_snippets
    for entry in entries:  # an attached docstring belongs to the module that its name begins with
        while entry.module not in modules and "." in entry.module:
            entry.module = entry.module.rpartition(".")[0]
    return entries, snippets


# ------------------------------------------------------------------------------------------------
# Finding source files


def package_root(package):
    """The folder of an installed package, or its single file; None if it is not installed."""
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a part of a package that is missing; __main__
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    return path.parent if path.name == "__init__.py" else path


def requirements_of(distribution):
    """The installed packages that a distribution needs, directly or indirectly, without extras."""
    found, queue = set(), [distribution]
    while queue:
        try:
            needs = importlib.metadata.requires(queue.pop()) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for need in needs:
            name = re.match(r"\w[\w-]*", need)[0].lower().replace("-", "_")
            if "extra ==" not in need and name not in found and package_root(name):
                found.add(name)
                queue.append(name)
    return sorted(found)


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
    """The entries and snippets of one source file."""
    package, path, module = job
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return [], []  # a template, or written for another Python
    lines, entries, snippets = source.splitlines(), [], []

    def visit(node, name):
        """Visits a module and all definitions in it, however deep."""
        docstring = None
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            docstring = ast.get_docstring(node)
        code = function_code(node, lines, docstring) if isinstance(node, FUNCTIONS) else ""
        if docstring:
            entries.append(Entry(package, module, name, plain_text(docstring), code))
        elif code:
            snippets.append(Snippet(package, module, "name", name, code))
        for block in ("body", "orelse", "handlers", "finalbody"):  # also of `if`, `try`, `with`
            for child in getattr(node, block, ()):
                defines = isinstance(child, (ast.ClassDef, *FUNCTIONS))
                visit(child, f"{name}.{child.name}" if defines else name)

    visit(tree, module)
    if "add_docstr" in source or "add_newdoc" in source:
        entries += attached_docstrings(tree, package)
    if module == "pydoc_data.topics":  # one dictionary: topic -> section of the language reference
        topics = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
        for key, text in ast.literal_eval(topics).items():
            entries.append(Entry(package, f"topics.{key}", f"topics.{key}", plain_text(text)))
    for comment, code in commented_code(lines):
        snippets.append(Snippet(package, module, "comment", comment, code))
    return entries, snippets


def function_code(node, lines, docstring):
    """The source of a function without its docstring; "" if nothing else is in it."""
    kept = lines[node.lineno - 1 : node.end_lineno]
    if docstring:
        first = node.body[0]
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
    return inspect.cleandoc("\n" + "\n".join(kept)) if len(node.body) > bool(docstring) else ""


def attached_docstrings(tree, package):
    """Docstrings that Python code attaches to compiled functions: torch's
    `add_docstr(torch.abs, "...")`, numpy's `add_newdoc("numpy", "flatiter", "...")`."""
    shared = defaultdict(str)  # the texts that torch inserts with `.format(**common_args)`
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_kwargs":
            for text in re.split(r"\n {4}(?! )", node.args[0].value):
                shared[text.split(" ")[0].strip()] = text.strip()
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    shared.setdefault(key.value, string_value(value, {}))

    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if not re.search(r"\badd_(docstr|docstr_all|newdoc)$", called) or len(node.args) < 2:
            continue
        *place, text = node.args
        if isinstance(text, ast.Tuple) and len(text.elts) == 2:  # numpy: an attribute and its text
            place, text = [*place, text.elts[0]], text.elts[1]
        parts = [p.value if isinstance(p, ast.Constant) else ast.unparse(p) for p in place]
        name = ".".join(["torch.Tensor", *parts] if called.endswith("_all") else parts)
        if docstring := string_value(text, shared):
            yield Entry(package, name, name, plain_text(inspect.cleandoc(docstring)))


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
    indents = [len(line) - len(line.lstrip()) if line.strip() else -1 for line in lines]
    end = 0
    for start, line in enumerate(lines):
        if start < end or not line.lstrip().startswith("# "):
            continue
        end = start
        while end < len(lines) and lines[end].lstrip().startswith("#"):
            end += 1
        comment = " ".join(line.strip(" \t#") for line in lines[start:end])
        first = end
        while end < min(len(lines), first + 20) and indents[end] >= indents[start]:
            if lines[end].lstrip().startswith("#"):
                break
            end += 1
        legal = re.search(r"copyright|licen[cs]e|noqa|pyre|mypy", comment, re.I)
        if comment[:1].isupper() and not legal:
            yield comment, "\n".join(line[indents[start] :] for line in lines[first:end])
