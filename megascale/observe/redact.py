"""Takes secrets out of a config before it leaves the machine."""

import re
from typing import Any

REDACTED = "<redacted>"
_SECRET_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|access[_-]?key|private[_-]?key|secret|password|passwd|credentials?|auth|token)([_-]|$)", re.I
)
_TOKEN_OF_A_TOKENIZER = re.compile(r"^(bos|cls|eos|eot|mask|pad|sep|unk)_token", re.I)
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redact(value: Any, name: str = "") -> Any:
    """Copies a config, with `<redacted>` for texts under names like `api_key`, `hf_token` or `password`.

    Numbers stay: `eos_token_id` is no secret. Credentials inside an address (`https://user:password@host`) go too.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if _SECRET_NAME.search(name) and not _TOKEN_OF_A_TOKENIZER.search(name):
        return REDACTED
    return _CREDENTIALS_IN_URL.sub(REDACTED, value)
