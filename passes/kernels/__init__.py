"""Operators that rewritten graphs call, and how each is lowered."""
