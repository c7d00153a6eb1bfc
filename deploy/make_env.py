"""Copy .env.example to .env with a random value for every blank one. Refuses to overwrite."""

import os
import re
import secrets
import sys
from pathlib import Path


def main() -> None:
    text = re.sub(
        r"(?m)^(\w+)=$", lambda blank: f"{blank[1]}={secrets.token_hex(32)}", Path(".env.example").read_text()
    )
    try:
        descriptor = os.open(".env", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        sys.exit(
            "error: .env is there already, and a running database keeps the password that it was made with; "
            "delete .env to draw new ones"
        )
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    print("wrote .env: keep it to yourself, the token in it lets its holder run code on the cluster")


if __name__ == "__main__":
    main()
