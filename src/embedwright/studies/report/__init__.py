"""The report: a run or results as one HTML page."""
