"""The page and plots that `nha quickstart` leaves behind, made from one plain `Results`."""

from nha.report.page import write_report
from nha.report.results import VARIANTS, Check, Cost, Form, Results, Sample, Tuning

__all__ = ["VARIANTS", "Check", "Cost", "Form", "Results", "Sample", "Tuning", "write_report"]
