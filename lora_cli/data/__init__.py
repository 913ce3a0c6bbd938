"""Rows -> text -> tokens: reading, formats, rendering, the trained mask, the token cache."""
