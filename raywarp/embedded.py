"""The earlier name of raywarp.data.embedded, which users' configurations still name.

They refer to the function as `raywarp.embedded:vader`.
"""

from raywarp.data.embedded import fetch_all, vader

__all__ = ["fetch_all", "vader"]

if __name__ == "__main__":
    fetch_all()
