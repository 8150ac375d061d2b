"""Markdown and plain text -> headings and the prose below them.

    title, sections = read_markup(text, ".md")
    # "Type Hints", [(("Rationale and Goals", "Non-goals"), "While the proposed typing ..."), ...]

Kept is what a person would read aloud. Front matter, link targets, footnotes and boilerplate
sections are left out. Of code the first lines are kept: people search for the names in it.
"""

import html
import re

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

CODE_LINES = 12  # of a block of code that are kept
BOILERPLATE = re.compile(
    r"(copyrights?|licen[cs]e|references?|footnotes?|acknowledge?ments?|(table of )?contents|"
    r"change ?log|(change|revision|version) history|bibliography|links|authors?|contributors?)\W*",
    re.I,
)


def read_markup(text, suffix):
    """(title, sections) of a text. suffix: of its file; .md and .markdown are Markdown.

    The title is "" if there is none. A section is (the headings above it, without the title; its
    prose). Sections without prose and boilerplate, such as a copyright, are left out."""
    title, parts = (markdown if suffix in (".md", ".markdown") else plain)(text)
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
# Markdown: a tree of nodes, each with a type and children

# what stands between the children of a node; a blank line for other types
SEPARATORS = {"tr": ", ", **dict.fromkeys(["inline", "strong", "em", "link", "s"], "")}
SEPARATORS |= dict.fromkeys(["bullet_list", "ordered_list", "list_item"], "\n")
SEPARATORS |= dict.fromkeys(["table", "thead", "tbody"], "\n")
URL = re.compile(r"https?://[^\s)>]+|mailto:")
MARKS = re.compile(  # what dialects of Markdown add: {#anchor}, [^footnote], [!note], [x] task
    r"\s*\{#[\w-]+\}|\^?\[\^[^\[\]]+\]|^\[![\w-]+\][-+]?\s*|^\[[ xX]\]\s+|!\[\[[^\[\]]*\]\]"
)
WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?#?([^\[\]|]*)\]\]")  # [[page|alias]]


def text_of(node):
    """A node as a person would read it."""
    match node.type:
        case "text":
            return WIKI_LINK.sub(r"\1", MARKS.sub("", URL.sub("", node.content)))
        case "softbreak" | "hardbreak":
            return "\n"
        case "html_inline":
            return "\n" if node.content.startswith("<br") else ""
        case "html_block":
            text = re.sub(r"(?s)<!--.*?-->|<[^<>]*>", "", node.content)
            return html.unescape(text).strip()
        case "code_inline" | "image" | "fence" | "code_block":
            return "\n".join(node.content.rstrip("\n").split("\n")[:CODE_LINES])
    separator, texts = SEPARATORS.get(node.type, "\n\n"), map(text_of, node.children)
    text = separator.join(filter(str.strip, texts) if separator else texts)
    return f"- {text}" if node.type == "list_item" else text


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
