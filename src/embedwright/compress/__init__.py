"""Models in other forms: for other programs, or smaller."""
