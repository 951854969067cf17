"""What MkDocs calls while it builds the site (mkdocs.yml names this file)."""

from notebook_pages import on_files
from page_text import on_page_content, on_page_markdown

__all__ = ["on_files", "on_page_content", "on_page_markdown"]
