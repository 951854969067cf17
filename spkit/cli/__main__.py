"""`python -m spkit.cli` is the command `spkit`."""

from spkit.cli.front import app

if __name__ == "__main__":
    app(prog_name="spkit")
