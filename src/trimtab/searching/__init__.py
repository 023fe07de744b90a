"""Which architecture for my task: methods, sizes, layers and learning rates tried by Optuna (`trimtab search`)."""
