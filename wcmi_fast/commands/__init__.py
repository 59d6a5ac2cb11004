"""What each command of `wcmi-fast` does; `wcmi_fast.cli` reads the command line."""
