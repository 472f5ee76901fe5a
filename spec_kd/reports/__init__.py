"""What all reports are rendered with: numbers, tables, charts, pages and pictures. No report is known here."""
