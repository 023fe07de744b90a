"""Which method for my task: methods trained alike on the same rows, and what came of it (`trimtab compare`)."""
