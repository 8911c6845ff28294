"""Offline suites and reports."""
