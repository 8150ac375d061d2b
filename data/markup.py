"""Markdown, reStructuredText and plain text -> headings and the prose below them.

    title, sections = read_markup(text, ".rst")
    # "Type Hints", [(("Rationale and Goals", "Non-goals"), "While the proposed typing ..."), ...]

It is no renderer: what a person would read aloud is kept, and what serves the page is not (front
matter, link targets, directives, footnotes, tables' rules, metadata at the top). Code that stands
between the prose is kept, its first lines at least: names in it are what people search for.
"""

import re

CODE_LINES = 12  # of a block of code that are kept
BOILERPLATE = re.compile(
    r"(copyrights?|licen[cs]e|references?|footnotes?|acknowledge?ments?|(table of )?contents|"
    r"change ?log|(change|revision|version) history|bibliography|links|authors?|contributors?)\W*",
    re.I,
)


def read_markup(text, suffix):
    """suffix of the file: .md, .markdown, .rst, or anything else for plain text. -> the title, ""
    if the text has none, and a list of (headings above it, prose), the title not among them.
    Sections without prose and boilerplate, such as a copyright, are left out."""
    text = text.replace("\r\n", "\n").replace("\t", "    ").lstrip("\ufeff")
    read = {".md": markdown, ".markdown": markdown, ".rst": restructured}.get(suffix, plain)
    title, parts = read(text)
    levels = [level for level, _, _ in parts if level]
    if not title and levels and levels[0] == min(levels):
        place = next(i for i, part in enumerate(parts) if part[0])
        _, heading, prose = parts[place]
        if levels.count(levels[0]) == 1 or not prose.strip():  # stands above all others, or alone
            title, parts[place] = heading, (0, "", prose)
    path, sections = [], []  # path: the headings above, each with its level
    for level, heading, prose in parts:
        if level:
            path = [above for above in path if above[0] < level]
            if BOILERPLATE.fullmatch(heading):
                continue
            path.append((level, heading))
        names = tuple(heading for _, heading in path)
        prose = re.sub(r"(?<=\w) \([, ]*\)(?=[\s.,;:]|$)", "", prose) if "(" in prose else prose
        prose = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ ]+\n", "\n", prose)).strip("\n")
        if prose.strip():
            sections.append((names, prose))
    return title, sections


def prose_of(body, inline):
    """Joins lines, given as ("text" or "code", line); inline takes the markup from a paragraph."""
    paragraphs = []
    for kind, line in body:
        kind = kind if line.strip() else "blank"
        if paragraphs and paragraphs[-1][0] == kind:
            paragraphs[-1][1].append(line)
        else:
            paragraphs.append((kind, [line]))
    texts = ("\n".join(lines) for _, lines in paragraphs)
    kinds = (kind for kind, _ in paragraphs)
    return "\n".join(
        inline(t) if kind == "text" else t for kind, t in zip(kinds, texts, strict=True)
    )


def table_row(line):
    if re.match(r"\s*\|.*\|\s*$", line):
        return ", ".join(cell.strip() for cell in line.strip().strip("|").split("|"))
    return line


def plain(text):
    """A short first line above a blank one is the title."""
    first, _, rest = text.strip().partition("\n")
    if rest.startswith("\n") and len(first) <= 100:
        return first.strip(), [(0, "", rest)]
    return "", [(0, "", text.strip())]


# ------------------------------------------------------------------------------------------------
# Markdown


def markdown(text):
    """-> title of the front matter, and (level, heading, prose) of every section; level 0: above
    the first heading."""
    title = ""
    if front := re.match(r"(---|\+\+\+)\n(.*?)\n\1[ ]*\n", text, re.S):
        text = text[front.end() :]
        named = re.search(r"^title\s*[:=]\s*[\"']?(.*?)[\"']?\s*$", front[2], re.M)
        title = named[1] if named else ""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    parts, fence, in_code = [[0, "", []]], "", 0
    for line in text.split("\n"):
        opening = re.match(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})", line)
        if fence:
            if opening and opening[1].startswith(fence) and not line.strip(" `~"):
                fence = ""
            elif (in_code := in_code + 1) <= CODE_LINES:
                parts[-1][2].append(("code", line))
            continue
        if opening:
            fence, in_code = opening[1], 0
            continue
        heading = re.match(r" {0,3}(#{1,6})\s+(.*?)\s*#*\s*$", line)
        body = parts[-1][2]
        if heading:
            parts.append([len(heading[1]), heading[2], []])
        elif body and re.fullmatch(r" {0,3}(=+|-{2,})\s*", line) and is_setext(body):
            _, above = body.pop()  # an underlined heading
            parts.append([1 if "=" in line else 2, above.strip(), []])
        elif (line := markdown_line(line)) is not None:
            body.append(("text", line))
    for part in parts[:2]:  # the page's metadata: "* Author: ...", below its title
        part[2] = without_metadata(part[2])
    return title, [
        (level, markdown_inline(heading), prose_of(body, markdown_inline))
        for level, heading, body in parts
    ]


def is_setext(body):
    """Whether the last line is a heading if the next one underlines it: a paragraph of one line."""
    kind, line = body[-1]
    alone = len(body) == 1 or not body[-2][1].strip()
    return kind == "text" and alone and bool(re.match(r"\s{0,3}[^\s>|*+-]", line))


def without_metadata(body):
    kept, dropping = [], False
    for kind, line in body:
        if re.match(r"[*+-] +\**[A-Z][\w /-]{1,30}(: ?\**|\**:) ?", line):
            dropping = True
        elif not (dropping and re.match(r"\s+\S", line)):
            dropping = False
        if not dropping:
            kept.append((kind, line))
    return kept


def markdown_line(line):
    """A line without what is markup of lines; None if nothing of it is to be read."""
    if re.fullmatch(r"\s*(\|?[\s:]*-{3,}[\s:|-]*|([*_-]\s*){3,})", line):
        return None  # a table's rule, a thematic break
    if re.match(r"\s*\[[^\]]+\]:\s*\S+", line):
        return None  # where a link leads
    line = re.sub(r"^\s*(>\s?)+", "", line)
    return table_row(line)


def markdown_inline(text):
    code = re.split(r"(`+[^`]+`+)", text)  # what stands in backticks is kept as it is
    for i in range(0, len(code), 2):
        part = re.sub(r"\s*\{#[\w-]+\}", "", code[i])
        part = re.sub(r"</?[A-Za-z][^<>]*>", "", part)
        part = re.sub(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", r"\2", part, flags=re.S)
        part = re.sub(r"(?<![\w*])([*_])(?=[^\s*_])([^*_]+?)(?<=\S)\1(?!\w)", r"\2", part)
        code[i] = re.sub(r"\\(?=[*_#\[\]`<>.])", "", part)
    text = "".join(re.sub(r"^`+ ?| ?`+$", "", x) if i % 2 else x for i, x in enumerate(code))
    text = re.sub(r"!\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"\[([^\[\]]+)\](\((?:[^()]|\([^)]*\))*\)|\[[^\]]*\])", r"\1", text)
    return re.sub(r"\[\^[^\]]+\]:?|<?https?://[^\s)>]+>?", "", text)


# ------------------------------------------------------------------------------------------------
# reStructuredText

READ_ALOUD = re.compile(  # directives of which the content is prose
    r"(note|warning|tip|hint|important|attention|caution|danger|error|seealso|admonition|topic|"
    r"epigraph|sidebar|versionadded|versionchanged|deprecated|rubric|container|compound|glossary)$"
)
SHOWS_CODE = re.compile(r"(code|code-block|sourcecode|literal|parsed-literal|doctest|prompt)$")
RULE = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*")


def restructured(text):
    """As `markdown`: the title of a header of fields such as a PEP's, and the sections."""
    text = re.sub(
        r"\A(\s*:[\w -]+:.*\n)+", "", text
    )  # fields of the page, above or below its title
    text = re.sub(r"(\A\s*(?:.*\n){1,2}([=*#~^-])\2{2,}\n\s*)(:[\w -]+:.*\n)+", r"\1", text)
    title, lines = "", text.split("\n")
    if re.match(r"[A-Z][\w-]*: ", text.lstrip()):
        header, _, rest = text.lstrip().partition("\n\n")
        named = re.search(r"^Title: (.*(?:\n\s+\S.*)*)", header, re.M)
        title, lines = rst_inline(" ".join(named[1].split())) if named else "", rest.split("\n")
    parts, styles, i = [[0, "", []]], [], 0
    while i < len(lines):
        if heading := rst_heading(lines, i):
            style, words, i = heading
            if style not in styles:
                styles.append(style)
            parts.append([styles.index(style) + 1, words, []])
            continue
        i = rst_block(lines, i, parts[-1][2])
    return title, [(n, rst_inline(name), prose_of(body, rst_inline)) for n, name, body in parts]


def rst_heading(lines, i):
    """(style, heading, number of the line below) if one begins at line i."""
    at = [line.rstrip() for line in lines[i : i + 3]] + [""] * 3
    rules = [RULE.fullmatch(line) is not None for line in at]
    if rules[0] and rules[2] and at[0] == at[2] and at[1].strip() and not rules[1]:
        return (at[0][0], "over"), at[1].strip(), i + 3
    words = at[0]
    if words and not words[0].isspace() and rules[1] and not rules[0]:
        alone = i == 0 or not lines[i - 1].strip()
        if alone and len(at[1]) >= min(len(words), 4) and len(at[1]) >= 0.7 * len(words):
            return (at[1][0], "under"), words, i + 2
    return None


def rst_block(lines, i, prose):
    """Appends what is to be read of the line or block at i; returns where the next begins."""
    line = lines[i]
    indent = len(line) - len(line.lstrip())
    marked = re.match(r"\s*\.\.(?:\s+(.*))?$", line)
    if marked:
        end = indented_end(lines, i + 1, indent)
        directive = re.match(r"([\w-]+)::\s*(.*)", marked[1] or "")
        if directive and READ_ALOUD.match(directive[1]):
            content = [line for line in lines[i + 1 : end] if not re.match(r"\s+:[\w-]+:", line)]
            inner, j = dedent([directive[2], *content] if directive[2] else content), 0
            while j < len(inner):
                j = rst_block(inner, j, prose)
        elif directive and SHOWS_CODE.match(directive[1]):
            content = [line for line in lines[i + 1 : end] if not re.match(r"\s+:[\w-]+:", line)]
            prose += code_lines(content)
        return end
    if re.fullmatch(r"[\s=]{5,}|[\s+=-]{5,}|\s*(__ .*|[^\w\s]{4,})", line) and line.strip():
        return i + 1  # the rules of a table, a transition, an anonymous target
    line = re.sub(r"^(\s*):([\w ./-]+):(\s|$)(?!`)", r"\1\2: ", line)  # a field
    literal = line.rstrip().endswith("::")
    if line.strip() != "::":
        prose.append(("text", table_row(re.sub(r"\s*::\s*$", ":", line) if literal else line)))
    if literal:
        end = indented_end(lines, i + 1, indent)
        prose += code_lines(lines[i + 1 : end])
        return end
    return i + 1


def code_lines(lines):
    return [("code", line) for line in dedent(lines)[: CODE_LINES + 1]]


def indented_end(lines, i, indent):
    """The first line from i on that is neither blank nor further in than `indent`."""
    end = i
    while end < len(lines) and (
        not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent
    ):
        end += 1
    while end > i and not lines[end - 1].strip():
        end -= 1
    return end


def dedent(lines):
    """The first line may follow its directive, and have no indent of its own."""
    depth = min((len(x) - len(x.lstrip()) for x in lines[1:] if x.strip()), default=0)
    return [lines[0].strip(), *(line[depth:] for line in lines[1:])] if lines else []


def rst_inline(line):
    """A paragraph without markup."""
    line = re.sub(r":(pep|rfc):`([^`<]+)`", lambda m: f"{m[1].upper()} {m[2]}", line)
    line = re.sub(r":[\w:+.-]+:`~?([^`<]+?)(\s*<[^`>]*>)?`", r"\1", line)
    line = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", line)
    line = re.sub(r"\s?\[[#\w*-]*\]_", "", line)
    line = re.sub(r"``(.+?)``", r"\1", line)
    line = re.sub(r"`([^`]+)`(__?)?", r"\1", line)
    line = re.sub(r"\|(\w[^|]*)\|_?", r"\1", line)
    line = re.sub(r"(\*\*|\*)(?=\S)([^*]+?)(?<=\S)\1(?![\w*])", r"\2", line)
    return re.sub(r"<?https?://[^\s)>]+>?", "", line).rstrip()
