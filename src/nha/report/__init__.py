"""The page and pictures of `nha quickstart`, made from one plain `Results`."""

from nha.report.results import Check, Cost, Results, Sample, Tuning, Variant

__all__ = ["Check", "Cost", "Results", "Sample", "Tuning", "Variant"]
