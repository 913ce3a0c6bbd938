"""What looks like a password, an access token or a private key, and text without it: applied wherever text leaves.

A recipe that holds one is refused. What other programs say (an address that a library could not reach, a traceback) is
printed and kept without it. Rows of a data set and the answers to them are the user's content and stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

_MIXED = r"(?=[a-z]*[A-Z0-9])"
"""A token has digits or capitals; a word that happens to follow `hf_` or `sk-` has none."""
_SECRET = re.compile(
    rf"""
      \b(?:hf_|sk-|sk_live_|sk_test_|gh[pousr]_|glpat-|npm_|pypi-|xox[abposr]-){_MIXED}[A-Za-z0-9]{{16,}}[\w-]*
    | \b(?:sk-(?:proj|ant|svcacct|or)-|github_pat_|xox[abposr]-\d+-)[\w-]{{16,}}
    | \b(?:AKIA|ASIA)[A-Z0-9]{{16}}\b
    | \bAIza[\w-]{{35}}
    | \beyJ[\w-]{{8,}}\.[\w-]{{8,}}\.[\w-]{{8,}}                     # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----(?:.*?-----END\ [A-Z ]*PRIVATE\ KEY-----|.*)
    | (?<=://)[^/\s@'"]*:[^/\s@'"]*@                                 # user:password@ of an address
    | (?<=[?&])(?i:[\w-]*(?:token|secret|passw(?:or)?d|api_?key|signature)|sig)=[^&\s'"]+
    | (?<=[Bb]earer\ )[\w.~+/-]{{16,}}=*
    """,
    re.VERBOSE | re.DOTALL,
)
_SECRET_NAME = re.compile(
    r"(^|[_-])(token|api[_-]?key|password|passwd|passphrase|secret|credentials?|access[_-]?key|private[_-]?key|auth)"
    r"($|[_-])",
    re.IGNORECASE,
)


def is_secret_name(key: str) -> bool:
    """Say whether a key is named like a password, token or API key."""
    return _SECRET_NAME.search(key) is not None


def holds_secret(value: Any) -> bool:
    """Say whether a text holds what looks like an access token, a private key, or an address with a password."""
    return isinstance(value, str) and _SECRET.search(value) is not None


def without_secrets(value: Any) -> Any:
    """Return plain values (JSON's) with `***` under each key that is named like a secret."""
    if isinstance(value, dict):
        return {
            key: "***" if is_secret_name(str(key)) else without_secrets(inner) for key, inner in value.items()
        }
    return [without_secrets(inner) for inner in value] if isinstance(value, list) else value


def redacted(text: str) -> str:
    """Return the text with what looks like a secret replaced by `***`."""
    return _SECRET.sub("***", text)
