"""HTML that goes into a page as it is."""

import re
from typing import ClassVar


class Raw:
    """HTML that Markdown must not touch: held here, and put in when the page has been made."""

    kept: ClassVar[list[str]] = []

    @classmethod
    def hold(cls, text: str) -> str:
        cls.kept.append(text)
        return f'<div class="raw">raw-{len(cls.kept) - 1}-raw</div>'

    @classmethod
    def put(cls, page: str) -> str:
        return re.sub(
            r'<div class="raw">raw-(\d+)-raw</div>', lambda found: cls.kept[int(found[1])], page
        )
