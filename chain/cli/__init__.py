"""The command `posttrain`: one file per family of subcommands."""
