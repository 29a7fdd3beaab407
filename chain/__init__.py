"""One recipe, run: the command and the orchestrator."""
