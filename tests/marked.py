"""Programs whose lines of CGC are marked, taken without these."""

import ast
import re

MARK = re.compile(r"\s*# CGC(?: - .*|, was: (?P<was>.*))?$")


def without_marked_lines(source):
    """Take out what CGC adds, and put back what it replaced; the body of a marked `with` moves to its place."""
    kept, outer = [], None
    for line in source.splitlines():
        indent = len(line) - len(line.lstrip())
        if outer is not None and line.strip() and indent <= outer:
            outer = None
        dedent = 4 if outer is not None else 0
        mark = MARK.search(line)
        if mark is None:
            kept.append(line[dedent:])
        elif mark["was"] is not None:
            kept.append(" " * (indent - dedent) + mark["was"])
        elif line.lstrip().startswith("with "):
            outer = indent
    return "\n".join(kept)


def words_of_cgc(source):
    """Return the words of a program, but for its docstring and comments, that speak of CGC."""
    program = ast.parse(source)
    program.body = program.body[1:]
    return re.findall(r"\w*cgc\w*|\breg\b|\blam\b|\w*margin\w*", ast.unparse(program), re.IGNORECASE)
