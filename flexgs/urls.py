"""Addresses that may be printed: without the users, passwords, tokens and keys that they contain.

    public("postgresql://me:se@cret@db/mlflow?sslpassword=x")    # postgresql://db/mlflow?sslpassword=***

Every address, error or command that is printed or stored goes through public(). Where a text can be read in
two ways, the reading that hides more is taken: an address that is cut too short can be looked up, but a
password that was shown cannot be taken back.
"""

import re
from urllib.parse import unquote

from flexgs.errors import cure

HIDDEN = "***"

_SECRET = (r"password|passwd|passphrase|passcode|pwd|secret|token|credential|signature"
           r"|(?:api|access|private)[_-]?key")
_NAME = rf"[\w.-]*(?:{_SECRET})[\w.-]*"
"""The name of an option, variable or key that holds a secret."""
_IN_QUERY = (r"[\w.%-]*(?:pass|pwd|secret|token|key|cred|sig|auth|user|uid|login|session|connect|jwt|sas|code"
             r"|ticket|otp)[\w.%-]*")
"""The name of a secret in a URL query, where more names are suspect: user, sig, odbc_connect."""
_PLACE = re.compile(r"(?:\b[a-z][a-z0-9+.-]+:/?|(?<![^\s'\"=(<])/)/(?=[^/\s])", re.IGNORECASE)
"""The text before a host name: a scheme with two slashes, or with one, as in paths made of addresses."""
_HOST = re.compile(r"(?:\[[0-9a-f:.]+\]|[^\s/?#:@'\"<>(){},;\\]*)", re.IGNORECASE)
_PORT = re.compile(r":\d{1,5}(?=$|[/?#\s'\"<>(){},;:\\])")
_RULES = [(re.compile(pattern, re.IGNORECASE), by) for pattern, by in (
    (r"(?<![\w/.@:%+-])[\w.%+-]+:[^\s@/'\"]+@(?=[\w\[])", ""),  # me:password@host
    (rf"([?&#;]{_IN_QUERY}=)[^&#\s'\"<>]+", rf"\g<1>{HIDDEN}"),  # ?token=..., in a query or fragment
    (r"(?<=[?&]|#)([\w.-]+=)[^&#\s'\"<>]*@", r"\1"),  # endpoint_override=user:password@host
    # a fragment that is not a page of MLflow's (#/...)
    (r"(//[^\s'\"<>]*#)(?=[^/\s'\"<>])(?![\w.%-]+=)[^\s'\"<>]+", rf"\g<1>{HIDDEN}"),
    # password=...
    (rf"(?<![\w?&#;.-])((?:--)?{_NAME}=)('[^']*'|\"[^\"]*\"|[^\s&,;)}}'\"]+)", rf"\g<1>{HIDDEN}"),
    (rf"(--{_NAME}\s+)('[^']*'|\"[^\"]*\"|[^\s-]\S*)", rf"\g<1>{HIDDEN}"),  # --password ...
    (rf"(?<![\w?&#;./-])([\w-]*(?:{_SECRET})[\w-]*\s*[:=]\s+)('[^']*'|\"[^\"]*\"|[^\s,;)}}'\"]+)",
     rf"\g<1>{HIDDEN}"),
    (rf"(['\"]{_NAME}['\"]\s*:\s*)('[^']*'|\"[^\"]*\"|[^\s,}}]+)", rf"\g<1>{HIDDEN}"),  # {"password": "..."}
    (r"\b(authorization:?\s*|)(bearer|basic)\s+[\w.~+/=-]{8,}", rf"\1\2 {HIDDEN}"),
    # HTTP headers
    (r"\b((?:set-)?cookie:|authorization[:=])(?!\s*(?:bearer|basic) \*)[^\n'\"]+", rf"\1 {HIDDEN}"),
    # keys recognised by their form
    (r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|xox[abp]-|sk-|dapi|eyJ[\w-]+\.)[\w.-]{16,}", HIDDEN))]


def is_url(text: str) -> bool:
    """Whether the text begins with SCHEME://, as an address does and a path does not."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def public(text: str) -> str:
    """Remove what gives access from a text, which may be an address, a command or an error.

    Removed are the user and password before the @ of an address, the values in a query or fragment that are
    named like secrets, and secrets in other common forms. Other text stays as it is.
    """
    return re.sub(r"[^\s'\"]*%[0-9A-Fa-f]{2}[^\s'\"]*", _encoded, _plain(text))


def _plain(text: str) -> str:
    done, rest = "", text
    while place := _PLACE.search(rest):
        done, rest = done + rest[:place.end()], rest[place.end():]
        rest = _without_user(rest)
    text = done + rest
    for rule, by in _RULES:
        text = rule.sub(by, text)
    return text


def _without_user(rest: str) -> str:
    """Drop user and password, which may contain @ / ? # and blanks, from the text after // of an address."""
    line = re.split(r"[\n'\"]|\s\S*//", rest, maxsplit=1)[0]
    word = re.split(r"\s", line, maxsplit=1)[0]
    authority = re.split(r"[/?#]", word, maxsplit=1)[0]
    name = _HOST.match(rest)
    assert name
    behind = rest[name.end():]
    if behind.startswith("@"):
        return rest[authority.rfind("@") + 1:]
    if not behind.startswith(":"):
        return rest
    if _PORT.match(behind) and ("@" not in word or re.search(r"[.\[]|^localhost$", name[0], re.IGNORECASE)):
        return rest  # a port: a password of digits would follow a user, whose name has no dot
    if "@" in line:
        return rest[(word if "@" in word else line).rfind("@") + 1:]
    return name[0] + rest[len(word):]  # the @ is missing, as in a text that was cut short: hide the rest


def _encoded(word: re.Match[str]) -> str:
    """Decode and clean a word whose percent signs encode a secret; return any other unchanged."""
    text = word[0]
    for _ in range(3):
        text = unquote(text)
        if (shown := _plain(text)) != text:
            return shown
    return word[0]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without secrets, cut to 200 characters."""
    return (public(str(error)).strip().splitlines() or [type(error).__name__])[0][:200]


def describe(error: BaseException) -> str:
    """Return one line: the error's class, its first line and, if memory or disk ran out, what to do."""
    for inner in ("health_check_failure", "cause"):  # the error that Ray has wrapped
        error = getattr(error, inner, None) or error
    text = public(str(error)).strip()
    line = f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}".rstrip(": ")
    return f"{line} ({advice})" if (advice := cure(error)) else line
