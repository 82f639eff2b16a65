"""Errors that volseg raises on purpose."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that its user can mend: one line that says what was wanted, what came and what to do."""
