"""Studies: many runs trained and scored, and reports to look at."""
