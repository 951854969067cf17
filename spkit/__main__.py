"""`python -m spkit` is the command `spkit`."""

from spkit.cli import app

if __name__ == "__main__":
    app(prog_name="spkit")
