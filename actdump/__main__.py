"""The command `actdump`. It holds signals back first, so that a run that is told to stop while it starts hears of it."""

from actdump.signals import hold


def main() -> None:
    """The entry point."""
    hold()
    from actdump import cli

    cli.main()


if __name__ == "__main__":
    main()
