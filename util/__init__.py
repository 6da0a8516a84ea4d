"""Plumbing that knows no model: it imports nothing from the top level."""
