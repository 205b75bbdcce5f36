"""The pictures of a report, drawn by matplotlib; nothing here is imported before a report is made."""
