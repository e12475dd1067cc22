"""The page and plots that `nha quickstart` leaves behind, made from one plain `Results`."""

from nha.report.page import write_report
from nha.report.results import FORMS, Check, Cost, Form, Results, Sample, Tuning

__all__ = ["FORMS", "Check", "Cost", "Form", "Results", "Sample", "Tuning", "write_report"]
