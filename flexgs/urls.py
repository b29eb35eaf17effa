"""Addresses as they may be shown: without the users, passwords, tokens and keys that they hold.

    public("postgresql://me:se@cret@db/mlflow?sslpassword=x")    # postgresql://db/mlflow?sslpassword=***

What is printed or kept of an address, an error or a command goes through public(). Where a text can be read
in two ways, the one that hides more is taken: an address that is cut too short can be looked up, a password
that was shown cannot be taken back.
"""

import re
from urllib.parse import unquote

HIDDEN = "***"

_SECRET = (r"password|passwd|passphrase|passcode|pwd|secret|token|credential|signature|(?:api|access|private)[_-]?key")
_NAME = rf"[\w.-]*(?:{_SECRET})[\w.-]*"
"""What an option, a variable or a key is named that holds a secret."""
_IN_QUERY = (r"[\w.%-]*(?:pass|pwd|secret|token|key|cred|sig|auth|user|uid|login|session|connect|jwt|sas|code|ticket|otp)"
             r"[\w.%-]*")
"""Likewise in a query, where more is one: user, sig, odbc_connect."""
_PLACE = re.compile(r"(?:\b[a-z][a-z0-9+.-]+:/?|(?<![^\s'\"=(<])/)/(?=[^/\s])", re.IGNORECASE)
"""Where a host follows; paths that were made of addresses have one slash."""
_HOST = re.compile(r"(?:\[[0-9a-f:.]+\]|[^\s/?#:@'\"<>(){},;\\]*)", re.IGNORECASE)
_PORT = re.compile(r":\d{1,5}(?=$|[/?#\s'\"<>(){},;:\\])")
_RULES = [(re.compile(pattern, re.IGNORECASE), by) for pattern, by in (
    (r"(?<![\w/.@:%+-])[\w.%+-]+:[^\s@/'\"]+@(?=[\w\[])", ""),  # me:password@host
    (rf"([?&#;]{_IN_QUERY}=)[^&#\s'\"<>]+", rf"\g<1>{HIDDEN}"),  # of a query or a fragment
    (r"(?<=[?&]|#)([\w.-]+=)[^&#\s'\"<>]*@", r"\1"),  # endpoint_override=user:password@host
    # a fragment that is no page of MLflow
    (r"(//[^\s'\"<>]*#)(?=[^/\s'\"<>])(?![\w.%-]+=)[^\s'\"<>]+", rf"\g<1>{HIDDEN}"),
    # password=...
    (rf"(?<![\w?&#;.-])((?:--)?{_NAME}=)('[^']*'|\"[^\"]*\"|[^\s&,;)}}'\"]+)", rf"\g<1>{HIDDEN}"),
    (rf"(--{_NAME}\s+)('[^']*'|\"[^\"]*\"|[^\s-]\S*)", rf"\g<1>{HIDDEN}"),  # --password ...
    (rf"(?<![\w?&#;./-])([\w-]*(?:{_SECRET})[\w-]*\s*[:=]\s+)('[^']*'|\"[^\"]*\"|[^\s,;)}}'\"]+)",
     rf"\g<1>{HIDDEN}"),
    (rf"(['\"]{_NAME}['\"]\s*:\s*)('[^']*'|\"[^\"]*\"|[^\s,}}]+)", rf"\g<1>{HIDDEN}"),  # {"password": "..."}
    (r"\b(authorization:?\s*|)(bearer|basic)\s+[\w.~+/=-]{8,}", rf"\1\2 {HIDDEN}"),
    # heads of HTTP
    (r"\b((?:set-)?cookie:|authorization[:=])(?!\s*(?:bearer|basic) \*)[^\n'\"]+", rf"\1 {HIDDEN}"),
    # keys known by their form
    (r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|xox[abp]-|sk-|dapi|eyJ[\w-]+\.)[\w.-]{16,}", HIDDEN))]


def is_url(text: str) -> bool:
    """Whether it begins as an address does, of whatever scheme, and not as a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def public(text: str) -> str:
    """The text, which may be an address, a command or an error, without what gives access: what stands before
    the @ of an address, values of a query or fragment that are named like secrets, and the like elsewhere.
    Other text stays as it is."""
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
    """The text behind the // of an address, without a user and password in front of the host. Passwords may
    hold @ / ? # and blanks as they are."""
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
        return rest  # not a password of digits and a slash, as users have no dots
    if "@" in line:
        return rest[(word if "@" in word else line).rfind("@") + 1:]
    return name[0] + rest[len(word):]  # the end is missing: an error that was cut short


def _encoded(word: re.Match[str]) -> str:
    """A word as it is, unless there are secrets in what its percent signs stand for: then that, without
    them."""
    text = word[0]
    for _ in range(3):
        text = unquote(text)
        if (shown := _plain(text)) != text:
            return shown
    return word[0]


def first_line(error: BaseException) -> str:
    """What an error says, without secrets, cut to a line that can be printed within another."""
    return (public(str(error)).strip().splitlines() or [type(error).__name__])[0][:200]
