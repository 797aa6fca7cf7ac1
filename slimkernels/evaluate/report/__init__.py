"""The report of a side-by-side run: one page, the same as Markdown, every record as JSON."""
