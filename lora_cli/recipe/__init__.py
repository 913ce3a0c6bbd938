"""The recipe: what a user may write (`schema`), and how YAML becomes it (`load`). No torch here."""
