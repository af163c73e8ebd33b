"""OpenAI-compatible endpoints: their address, which is written to manifests, and their key, which is written nowhere."""

import os
import re

from dynamicrag.stage import UserError

BASE_URL = re.compile(r"https?://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:\d{1,5})?(/[^\s?#]*)?", re.IGNORECASE)


def check_url(flag: str, url: str, variable: str) -> str:
    """The address without a slash at its end. Raises UserError for one with more than host and path."""
    if not BASE_URL.fullmatch(url):  # not shown: what is wrong with it may be the key
        raise UserError(
            f"{flag}: expected http(s)://host[:port][/path] without user, password or query, as it is written to "
            f"manifests: a key belongs in the environment variable {variable}"
        )
    return url.rstrip("/")


def read_key(*variables: str) -> str:
    """The key of the first of these environment variables that has one, else none. Raises UserError for what no header can hold."""
    key = next(filter(None, map(os.environ.get, variables)), "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{' or '.join(variables)}: expected printable ASCII without spaces")
    return key


def without_key(text: str, key: str) -> str:
    """What a server said, which may repeat the key."""
    return text.replace(key, "[key]") if key else text
