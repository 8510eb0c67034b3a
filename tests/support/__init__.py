"""Helpers that several test files share. This package contains no tests, and test modules do not import each other."""
