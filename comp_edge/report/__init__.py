"""The report of a pruned model: one self-contained page, and one picture."""

from comp_edge.report.page import write_report
from comp_edge.report.summary import write_picture

__all__ = ["write_picture", "write_report"]
