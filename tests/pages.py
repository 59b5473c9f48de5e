"""The Python of a page in Markdown."""

import re


def run_blocks(page, names, after=lambda names: None):
    """Run a page's blocks from top to bottom as one program, which may use these names, and leaves its own in them.

    After each block `after` may look at them.
    """
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # the page itself is under test
        after(names)
