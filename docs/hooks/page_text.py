"""Pages are written for GitHub, too: here its Markdown and its links become the site's."""

import posixpath
import re
from pathlib import Path

from raw import Raw

PAGES = {  # file of the repository: page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "outputs/README.md": "outputs.md",
    "notebooks/solutions": "solutions/index.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)(```|~~~)")


def on_page_markdown(markdown, page, config, files):
    """MkDocs calls this with each page's text."""
    source = page.file.src_uri
    if page.file.generated_by is None:
        markdown = rewritten(markdown, f"docs/{source}", source)
    return as_github_reads(markdown)


def on_page_content(html, page, config, files):
    """MkDocs calls this with each page's HTML: tables may scroll, and raw HTML is put in."""
    html = html.replace("<table>", '<div class="scroll"><table>')
    html = html.replace("</table>", "</table></div>")
    # "24.1 [18.3, 30.2] *" stays on one line
    html = re.sub(r"<td>(-?[\d.,]+ \[[^<\]]+\][ *]*)</td>", r'<td class="interval">\1</td>', html)
    html = re.sub(r"<td>([^<]{40,})</td>", r'<td class="long">\1</td>', html)
    return Raw.put(html)


# ---- links ---------------------------------------------------------------------------------------


def page_of(path: str) -> str | None:
    """The site's page or file of a path of the repository, if it has one."""
    if path in PAGES:
        return PAGES[path]
    if found := re.fullmatch(r"notebooks/solutions/(\w+)\.ipynb", path):
        return f"solutions/{found[1]}.md"
    if found := re.fullmatch(r"notebooks/(\w+)\.ipynb", path):
        return f"notebooks/{found[1]}.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return None


def rewritten(text: str, source: str, page: str) -> str:
    """Links between files of the repository become links between pages.

    source: the file in the repository; page: its page. A link to a file that has no page becomes
    the file's name beside the words.
    """

    def replace(found):
        image, words, link = found.groups()
        if re.match(r"[a-z]+:|#", link):
            return found[0]
        path, hash_, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        to = page_of(target)
        if to is None:
            return words if Path(target).name in words else f"{words} (`{target}`)"
        to = posixpath.relpath(to, posixpath.dirname(page) or ".")
        return f"{image}[{words}]({to}{hash_}{anchor})"

    return outside_code(text, lambda part: LINK.sub(replace, part))


# ---- Markdown ------------------------------------------------------------------------------------


def as_github_reads(text: str) -> str:
    """Blank lines that GitHub does not need: around equations, before lists and tables."""
    return outside_code(text, spaced)


def spaced(text: str) -> str:
    text = re.sub(r"^(\$\$(?:(?!\$\$)[\s\S])+\$\$)$", r"\n\1\n", text, flags=re.M)
    text = re.sub(r"(?<=[^\n])\n(Code: )", r"\n\n\1", text)
    lines, out = text.split("\n"), []
    for line in lines:
        before = out[-1] if out else ""
        opens = re.match(r"( *)([*-]|\d+\.) |\|", line)
        follows = re.match(r" *([*-]|\d+\.) |\|| ", before) or not before.strip()
        if opens and not follows:
            out.append("")
        # nested lists: two or three blanks on GitHub, four here
        out.append(re.sub(r"^ {2,3}(?=([*-]|\d+\.) )", "    ", line))
    return "\n".join(out)


def outside_code(text: str, change) -> str:
    """`change` applied to what is not in a fenced block."""
    parts: list[str] = []
    lines: list[str] = []
    fence = None
    for line in text.split("\n"):
        found = FENCE.match(line)
        if fence is None and found:
            parts += [change("\n".join(lines))] if lines else []
            lines, fence = [line], found[2]
        elif fence is not None and line.strip() == fence:
            parts.append("\n".join([*lines, line]))
            lines, fence = [], None
        else:
            lines.append(line)
    rest = "\n".join(lines)
    parts += [rest if fence else change(rest)] if lines else []
    return "\n".join(parts)
