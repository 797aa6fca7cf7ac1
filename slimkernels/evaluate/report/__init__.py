"""A report of an evaluation: one static HTML page, the same content as Markdown, and all records."""

from slimkernels.evaluate.report.write import describe_outputs, write_report

__all__ = ["describe_outputs", "write_report"]
