"""The command `posttrain`, one file a family of subcommands."""
