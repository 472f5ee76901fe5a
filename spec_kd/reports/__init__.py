"""The renderers of all reports: numbers, tables, charts, pages and pictures. No report is known here."""

from spec_kd.reports.sections import Section
from spec_kd.reports.tables import Table

__all__ = ["Section", "Table"]
