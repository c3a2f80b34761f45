"""When a run's prompts were rendered, kept with its policies.

A chat template may ask for the date. The same command a day later must read the same prompts.
"""

from datetime import datetime

from raywarp.config.schema import Config, ConfigError
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError, parse_record, record_bytes

MOMENT_FILE = "prompts.json"


def stored_moment(config: Config) -> datetime | None:
    """Return when the prompts of the run's store were rendered first, or None.

    Raises:
        ConfigError: the store's record is not as it was written.
    """
    found = _read(Storage(config.store or config.out))
    return datetime.fromisoformat(found) if found else None


def keep_moment(store: Storage, moment: str | None) -> None:
    """Keep when the prompts were rendered, for all later runs with this store.

    Args:
        moment: in ISO 8601; None where no template asks for the date.

    Raises:
        ConfigError: another run has stored a different moment since the prompts were rendered.
    """
    if moment is None or (known := _read(store)) == moment:
        return
    if known is not None:
        raise ConfigError(
            f"another run with the store {store.uri} has just rendered its prompts with the date of"
            f" {known}; start this run again, and it takes the same"
        )
    store.write(MOMENT_FILE, record_bytes({"rendered_at": moment}))


def _read(store: Storage) -> str | None:
    data = store.read(MOMENT_FILE)
    if data is None:
        return None
    try:
        moment: str = parse_record(data, f"{store.uri}/{MOMENT_FILE}")["rendered_at"]
    except DamagedError as error:
        raise ConfigError(
            f"{error}; it says with which date the run's prompts were made. Without the file, what"
            " is not yet trained gets today's"
        ) from None
    return moment
