"""Markdown and plain text -> headings and the prose below them.

    title, sections = read_markup(text, ".md")
    # "Type Hints", [(("Rationale and Goals", "Non-goals"), "While the proposed typing ..."), ...]

Kept is what a person would read aloud, and code and mathematics as written. Front matter, link
targets, footnotes and boilerplate sections are left out.
"""

import re
import sys

import yaml
from markdown_it import MarkdownIt
from markdown_it.common.html_blocks import block_names
from mdit_py_plugins.admon import admon_plugin
from mdit_py_plugins.footnote import footnote_plugin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOILERPLATE = re.compile(
    r"(copyrights?|licen[cs]e|references?|footnotes?|acknowledge?ments?|(table of )?contents|"
    r"change ?log|(change|revision|version) history|bibliography|links|authors?|contributors?)\W*",
    re.I,
)


def read_markup(text, suffix):
    """(title, sections) of a text. suffix: of its file; .md and .markdown are Markdown.

    The title is "" if there is none. A section is (the headings above it, without the title; its
    prose). Sections without prose and boilerplate, such as a copyright, are left out."""
    try:
        title, parts = (markdown if suffix in (".md", ".markdown") else plain)(text)
    except RecursionError:  # hundreds of quotes or brackets, one within the other
        title, parts = plain(text)
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
        prose = "\n\n".join(filter(str.strip, blocks))
        if prose := re.sub(r"(?m)[^\S\n]+$", "", prose).strip("\n"):
            sections.append((tuple(heading for _, heading in path), prose))
    return title, sections


def plain(text):
    """A short first line above a blank one is the title."""
    first, _, rest = text.strip().partition("\n")
    if rest.startswith("\n") and len(first) <= 100:
        return first.strip(), [(0, "", [rest])]
    return "", [(0, "", [text.strip()])]


def front_matter(text):
    """(title, the text below) where a mapping stands at the very beginning, YAML between --- and
    --- or ..., or TOML between +++ and +++. What the parsers refuse is text."""
    first, *lines = text.split("\n")
    ends = {"---": ("---", "..."), "+++": ("+++",)}.get(first.rstrip(), ())
    end = next((i for i, line in enumerate(lines) if line.rstrip() in ends), None)
    if end is None or ("---" in ends and not lines[0].strip()):  # a rule above a blank line
        return "", text
    source = "\n".join(lines[:end])
    try:  # BaseLoader leaves values as they are written: a title may be 007 or 2024-01-05
        fields = tomllib.loads(source) if "+++" in ends else yaml.load(source, yaml.BaseLoader)
        title = fields.get("title") or ""
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError):  # the last: no mapping
        return "", text
    title = "" if isinstance(title, (list, dict)) or title in ("null", "~") else str(title)
    return " ".join(title.split()), "\n".join(lines[end + 1 :])


# ------------------------------------------------------------------------------------------------
# Markdown: two rules for what CommonMark lacks, and the parser's tokens -> text

MATH = re.compile(r"(?s)\$\$.*?\$\$|\\\[[ \t]*\n.*?\\\]|\\begin\{(\w+\*?)\}.*?\\end\{\1\}")
# script and style; %%comment%%, {{ template }}, ^block; {#anchor .class}, [!note], [x] of a task,
# ![[picture]]; [[page|text]]; $mathematics$
INLINE = re.compile(
    r"<(script|style)\b.*?</\1\s*>|%%.*?%%|\{[{%].*?[%}]\}+|(?<=\s)\^[\w-]+\Z"
    r"|\{:? ?[#.][^{}\n]*\}|\A\[![^\[\]]+\][-+]?\s*|\A\[[ x/>-]\]\s+|!\[\[[^\[\]]*\]\]"
    r"|\[\[([^\[\]|]*\|)?#?(?P<text>[^\[\]]+)\]\]"
    r"|(?P<math>\$\$.+?\$\$|\$(?=\S)(\\.|[^$\\])+?(?<=\S)\$(?!\d))",
    re.I | re.S,
)
# what stands between the texts in an HTML tag; a blank line for others
SEPARATORS = {"tr": ", ", **dict.fromkeys(["ul", "ol", "li", "table", "thead", "tbody"], "\n")}
BREAK = re.compile(rf"</?(br|{'|'.join(block_names)})\b", re.I)
URL = re.compile(r"https?://[^\s)>]+|mailto:")


def math_block(state, first, end, silent):
    """A parser's rule: mathematics of several lines is one block, whatever its lines are like."""
    start = state.bMarks[first] + state.tShift[first]
    match = MATH.match(state.src, start, state.eMarks[end - 1])
    if not match or "\n" not in match[0] or state.is_code_block(first):
        return False
    if not silent:
        state.line = first + match[0].count("\n") + 1
        token = state.push("math_block", "", 0)
        token.content = state.getLines(first, state.line, state.blkIndent, False)
    return True


def inline_rule(state, silent):
    """A parser's rule: of what INLINE matches, `math` is kept as written and `text` is parsed."""
    match, end = INLINE.match(state.src, state.pos, state.posMax), state.posMax
    if match and not silent:
        state.pending += match["math"] or ""
        state.pos, state.posMax = match.span("text")
        state.md.inline.tokenize(state)
    if match:
        state.pos, state.posMax = match.end(), end
    return bool(match)


MARKDOWN = MarkdownIt("commonmark", {"maxNesting": 1000}).enable(["table", "strikethrough"])
MARKDOWN.use(footnote_plugin).use(admon_plugin)
MARKDOWN.block.ruler.before("fence", "math", math_block, {"alt": ["paragraph", "blockquote"]})
HTML = MarkdownIt("zero", {"html": True}).enable(["html_inline", "entity"])
for parser in (MARKDOWN, HTML):
    parser.inline.ruler.before("link", "inline_rule", inline_rule)


def markdown(text):
    """The title of the front matter, and (level, heading, blocks) of every section; level 0: above
    the first heading."""
    title, text = front_matter(text)
    tokens, parts = iter(MARKDOWN.parse(text)), [(0, "", [])]
    for token in tokens:
        block = block_text(token, tokens)
        if token.type == "heading_open":
            parts.append((int(token.tag[1]), " ".join(block.split()), []))
        elif token.type != "footnote_block_open":
            parts[-1][2].append(block.strip("\n"))
    return title, parts


def block_text(token, tokens):
    """A block as a person would read it. Takes its other tokens from the iterator `tokens`."""
    if token.type == "inline":
        return inline_text(token.children)
    if token.type == "html_block":
        text = inline_text(HTML.parseInline(token.content)[0].children)
        return re.sub(r"([ \t]*\n)+", "\n", text)
    if token.nesting == 0:
        return token.content.strip("\n")  # code and mathematics; of a rule nothing
    texts = []
    while (child := next(tokens)).nesting >= 0:
        texts.append(block_text(child, tokens))
    text = SEPARATORS.get(token.tag, "\n\n").join(filter(str.strip, texts))
    return f"- {text}" if token.tag == "li" else text


def inline_text(tokens):
    """The text of a paragraph, without its marks and URLs. NUL stands for a URL meanwhile, which
    takes parentheses around it along; the parser lets none through."""
    texts = []
    for token in tokens:
        text = token.content  # of code and pictures; of a mark it is empty
        if token.type == "text":
            text = URL.sub("\0", text)
        elif token.tag == "br":  # a line break of either kind
            text = "\n"
        elif token.type == "html_inline":
            text = "\n" if BREAK.match(text) else ""
        texts.append(text)
    return re.sub(r"\s*\([\s,\0]*\0[\s,\0]*\)|\0", "", "".join(texts)).strip()
