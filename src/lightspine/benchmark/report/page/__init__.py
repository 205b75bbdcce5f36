"""The page of a report: what it says, in which order, and how it becomes HTML."""
