"""API keys: which of them a request carries, without telling by the time it takes how much of one was right."""

import dataclasses
import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from jaxllm.errors import ConfigError
from jaxllm.serving.config import ServerConfig

ENVIRONMENT = "JAXLLM_API_KEY"
ADMIN_ENVIRONMENT = "JAXLLM_ADMIN_API_KEY"


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """A key as the server keeps it.

    Attributes:
      digest: SHA-256 of the key; the key itself is not kept.
      name: what logs call it; says nothing of the key.
      salt: of its prefix cache, so that no client can measure whether another's prompt is cached.
    """

    digest: bytes
    name: str
    salt: str

    @staticmethod
    def of(key: str) -> "ApiKey":
        digest = hashlib.sha256(key.encode()).digest()
        salt = hashlib.sha256(b"salt" + digest).hexdigest()[:32]
        return ApiKey(digest, "key-" + hashlib.sha256(b"name" + digest).hexdigest()[:8], salt)


class ApiKeys:
    """The keys that are accepted; none at all accepts everybody."""

    def __init__(self, keys: list[str]):
        self._keys = [ApiKey.of(key) for key in dict.fromkeys(keys)]

    @property
    def needed(self) -> bool:
        """Whether requests need one."""
        return bool(self._keys)

    def find(self, headers: Mapping[bytes, bytes]) -> ApiKey | None:
        """The key in `Authorization: Bearer …` (or `x-api-key: …`); None if there is none or it is unknown."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(given.strip()).digest()
        found = None
        for key in self._keys:  # all of them, always
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def load_keys(config: ServerConfig) -> ApiKeys:
    """Keys of the options, the file and $JAXLLM_API_KEY. Raises ConfigError for a file without any."""
    keys = list(config.api_key)
    if config.api_key_file is not None:
        lines = [line.strip() for line in Path(config.api_key_file).read_text().splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"api_key_file={config.api_key_file!r}: holds no key")
        keys += found
    if os.environ.get(ENVIRONMENT):
        keys.append(os.environ[ENVIRONMENT])
    return ApiKeys(keys)


def load_admin_keys(config: ServerConfig) -> ApiKeys:
    """Keys of the admin routes, from the option and $JAXLLM_ADMIN_API_KEY. Raises ConfigError for one that clients have
    too: whoever may ask for tokens may not therefore do this."""
    keys = list(config.admin_api_key)
    if os.environ.get(ADMIN_ENVIRONMENT):
        keys.append(os.environ[ADMIN_ENVIRONMENT])
    clients = load_keys(config)
    if any(clients.find({b"x-api-key": key.encode()}) for key in keys):
        raise ConfigError("admin_api_key=…: must differ from every api_key")
    return ApiKeys(keys)
