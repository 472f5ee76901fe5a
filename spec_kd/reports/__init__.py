"""The renderers of all reports: numbers, tables, charts, pages and pictures. No report is known here."""

from spec_kd.reports.rendering import Section, Table

__all__ = ["Section", "Table"]
