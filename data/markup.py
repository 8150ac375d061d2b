"""Markdown, reStructuredText and plain text -> headings and the prose below them.

    title, sections = read_markup(text, ".rst")
    # "Type Hints", [(("Rationale and Goals", "Non-goals"), "While the proposed typing ..."), ...]

Kept is what a person would read aloud. Front matter, link targets, footnotes and boilerplate
sections are left out. Of code the first lines are kept: people search for the names in it.
"""

import html
import re
from collections import defaultdict

from docutils.core import publish_doctree
from docutils.nodes import TextElement, container, inline, literal_block, paragraph
from docutils.parsers.rst import Directive, directives, roles
from docutils.parsers.rst.languages import en as docutils_names
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

CODE_LINES = 12  # of a block of code that are kept
BOILERPLATE = re.compile(
    r"(copyrights?|licen[cs]e|references?|footnotes?|acknowledge?ments?|(table of )?contents|"
    r"change ?log|(change|revision|version) history|bibliography|links|authors?|contributors?)\W*",
    re.I,
)


def read_markup(text, suffix):
    """(title, sections) of a text. suffix: of its file; .md, .markdown and .rst are markup.

    The title is "" if there is none. A section is (the headings above it, without the title; its
    prose). Sections without prose and boilerplate, such as a copyright, are left out."""
    read = {".md": markdown, ".markdown": markdown, ".rst": restructured}.get(suffix, plain)
    title, parts = read(text)
    levels = [level for level, _, _ in parts[1:]]
    if levels and levels[0] == min(levels):
        _, heading, blocks = parts[1]
        alone = levels.count(levels[0]) == 1 or not any(blocks)
        if heading == title or (alone and not title):
            title, parts[1] = heading, (0, "", blocks)
    path, sections = [], []  # path: (level, heading) of the headings above
    for level, heading, blocks in parts:
        if level:
            path = [above for above in path if above[0] < level]
            if BOILERPLATE.fullmatch(heading):
                continue
            path.append((level, heading))
        prose = "\n\n".join(block for block in blocks if block.strip())
        prose = re.sub(r"(?<=\w) \([, ]*\)(?=[\s.,;:]|$)", "", prose)  # "(URL)" without the URL
        prose = "\n".join(line.rstrip() for line in prose.split("\n")).strip("\n")
        if prose:
            sections.append((tuple(heading for _, heading in path), prose))
    return title, sections


def plain(text):
    """A short first line above a blank one is the title."""
    first, _, rest = text.strip().partition("\n")
    if rest.startswith("\n") and len(first) <= 100:
        return first.strip(), [(0, "", [rest])]
    return "", [(0, "", [text.strip()])]


# ------------------------------------------------------------------------------------------------
# Both parsers give a tree of nodes, each with a kind and children

# what stands between the children of a node; a blank line for other kinds
SEPARATORS = {"tr": ", ", "row": ", ", "definition_list_item": ": ", "field": ": "}
SEPARATORS |= dict.fromkeys(["inline", "strong", "em", "link", "s"], "")
SEPARATORS |= dict.fromkeys(["bullet_list", "ordered_list", "enumerated_list", "list_item"], "\n")
SEPARATORS |= dict.fromkeys(["definition_list", "field_list", "line_block"], "\n")
SEPARATORS |= dict.fromkeys(["table", "tgroup", "thead", "tbody"], "\n")
NOT_READ = ("comment", "substitution_definition", "footnote", "citation", "system_message")
AS_IT_IS = ("code_inline", "image", "fence", "code_block", "literal_block", "doctest_block")
URL = re.compile(r"https?://[^\s)>]+|mailto:")
MARKS = re.compile(  # what dialects of Markdown add: {#anchor}, [^footnote], [!note], [x] task
    r"\s*\{#[\w-]+\}|\^?\[\^[^\[\]]+\]|^\[![\w-]+\][-+]?\s*|^\[[ xX]\]\s+|!\[\[[^\[\]]*\]\]"
)
WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?#?([^\[\]|]*)\]\]")  # [[page|alias]]


def text_of(node):
    """A node of either tree as a person would read it."""
    in_markdown = isinstance(node, SyntaxTreeNode)
    kind = node.type if in_markdown else node.tagname
    if kind in NOT_READ:
        return ""
    if kind == "#text":
        return URL.sub("", node)
    if kind == "text":
        return WIKI_LINK.sub(r"\1", MARKS.sub("", URL.sub("", node.content)))
    if kind in ("softbreak", "hardbreak"):
        return "\n"
    if kind == "html_inline":
        return "\n" if node.content.startswith("<br") else ""
    if kind == "html_block":
        return html.unescape(re.sub(r"(?s)<!--.*?-->|<[^<>]*>", "", node.content)).strip()
    if kind in AS_IT_IS:
        text = node.content if in_markdown else node.astext()
        return "\n".join(text.rstrip("\n").split("\n")[:CODE_LINES])
    if kind in ("footnote_reference", "citation_reference"):
        return "\0"  # left out below, with the space before it
    texts = [text_of(child) for child in node.children]
    if isinstance(node, TextElement):
        return "".join(texts).replace(" \0", "").replace("\0", "")
    separator = SEPARATORS.get(kind, "\n\n")
    text = separator.join(filter(str.strip, texts) if separator else texts)
    return f"- {text}" if kind == "list_item" else text


# ------------------------------------------------------------------------------------------------
# Markdown


def markdown(text):
    """The title of the front matter, and (level, heading, blocks) of every section; level 0: above
    the first heading."""
    title, text = front_matter(text)
    parser, parts = MarkdownIt("commonmark", {"maxNesting": 100}), [(0, "", [])]
    parser.enable(["table", "strikethrough"])
    for node in SyntaxTreeNode(parser.parse(text)).children:
        if node.type == "heading":
            parts.append((int(node.tag[1]), " ".join(text_of(node).split()), []))
        elif node.type != "paragraph" or not re.match(r"\[\^.+?\]:", node.children[0].content):
            parts[-1][2].append(text_of(node).strip("\n"))
    return title, parts


def front_matter(text):
    """(title, the text below): fields between two lines of --- or +++ at the very beginning."""
    match = re.match(r"(---|\+\+\+)\s*\n([\w-]+\s*[:=].*?\n)\1[ \t]*$", text, re.S | re.M)
    if not match:  # also for a rule, and text between two of them
        return "", text
    title = re.search(r"^title[ \t]*[:=][ \t]*[\"']?([^\s\"'>|].*?)[\"']?[ \t]*$", match[2], re.M)
    return title[1] if title else "", text[match.end() :]


# ------------------------------------------------------------------------------------------------
# reStructuredText

SETTINGS = {"report_level": 5, "halt_level": 5, "warning_stream": False, "_disable_config": True}
SETTINGS |= {"file_insertion_enabled": False, "raw_enabled": False, "syntax_highlight": "none"}
SETTINGS |= {"doctitle_xform": False, "docinfo_xform": False, "line_length_limit": 10**9}
SAID = {"versionadded": "Added in", "versionchanged": "Changed in", "deprecated": "Deprecated in"}
CODE = ("code", "code-block", "sourcecode", "prompt", "testcode", "doctest", "ipython")
SILENT = ("contents", "toctree", "index", "literalinclude", "currentmodule", "highlight")


class AnyDirective(Directive):
    """Stands for a directive of Sphinx: keeps argument and content, whatever the options."""

    has_content, optional_arguments, final_argument_whitespace = True, 1, True
    option_spec = defaultdict(lambda: directives.unchanged, name=directives.unchanged)

    def run(self):
        if self.name in SILENT:
            return []
        if self.name in CODE:
            return [literal_block("", "\n".join(self.content))]
        found = container()
        if self.arguments:
            argument = f"{SAID.get(self.name, '')} {self.arguments[0]}".strip()
            found += paragraph("", "", *self.state.inline_text(argument, self.lineno)[0])
        self.state.nested_parse(self.content, self.content_offset, found)
        return [found]


def any_role(name, rawtext, text, lineno, inliner, options=None, content=()):
    """Stands for a role of Sphinx: `~module.name` and `title <target>` keep their text."""
    return [inline(rawtext, re.sub(r"(?<=\S)\s*<[^<>]*>$", "", text).lstrip("~!"))], []


def restructured(text):
    """As `markdown`: the title of a header such as a PEP's, and the sections."""
    for name in re.findall(r"\.\. ([\w:+.-]+)::", text.lower()):
        if name in (*CODE, *SILENT, "class") or name not in docutils_names.directives:
            directives.register_directive(name, AnyDirective)
    for name in re.findall(r":([a-z][\w:+.-]*):`", text.lower()):
        if name not in docutils_names.roles:
            roles.register_local_role(name, any_role)
    header, title = re.match(r"\s*((?:[A-Z][\w-]*:.*\n(?:[ \t]+.*\n)*)+)\n", text), ""
    if named := header and re.search(r"^Title:(.*(?:\n[ \t]+.*)*)", header[1], re.M):
        title, text = " ".join(named[1].split()), text[header.end() :]
    parts = [(0, "", [])]
    add_sections(publish_doctree(text, settings_overrides=SETTINGS), 1, parts)
    return title, parts


def add_sections(node, level, parts):
    for child in node.children:
        if child.tagname == "section":
            parts.append((level, " ".join(text_of(child[0]).split()), []))
            add_sections(child, level + 1, parts)
        elif child.tagname == "field_list" and len(parts) <= 2 and not any(parts[-1][2]):
            continue  # fields of the page, above or below its title
        elif child.tagname != "title":
            parts[-1][2].append(text_of(child).strip("\n"))
